from tests.data.leaks_test import photos, write_source
from tests.launched import launch


def command(*flags):
  return launch("prepare_data", "--config=ml_configs/base.py", *flags)


def test_check_leaks_names_the_pairs_and_fails(tmp_path):
  images = photos("train", range(4)) | photos("heldout", [3, 9])
  source = write_source(tmp_path / "in", images)
  flags = [f"--config.raw.source={source}", "--config.raw.resolution=64", f"--workdir={tmp_path}"]
  unprepared = command(*flags, "--check_leaks")
  assert unprepared.returncode == 2
  assert "run `cm3leon prepare_data`" in unprepared.stderr
  assert command(*flags).returncode == 0
  checked = command(*flags, "--check_leaks")
  assert checked.returncode == 2
  assert "heldout_images 2, train_images 4, near_pairs 1, leaked_heldout_images 1" in checked.stdout
  assert (
    "near: heldout 'heldout3', train 'train3', PSNR inf dB, hash distance 0.00" in checked.stdout
  )
  assert "error: 1 of 2 held-out images" in checked.stderr


def test_check_leaks_passes_where_nothing_leaks(tmp_path):
  source = write_source(tmp_path / "in", photos("train", range(4)) | photos("heldout", [9]))
  flags = [f"--config.raw.source={source}", "--config.raw.resolution=64", f"--workdir={tmp_path}"]
  assert command(*flags).returncode == 0
  checked = command(*flags, "--check_leaks")
  assert checked.returncode == 0
  assert "near_pairs 0, leaked_heldout_images 0" in checked.stdout


def test_scenes_are_checked_by_their_facts(tmp_path):
  flags = ["--config.raw.source=scenes", "--config.raw.resolution=48", "--config.raw.max_texts=0"]
  flags += ["--config.scenes.train=60", "--config.scenes.heldout=14", f"--workdir={tmp_path}"]
  prepared = command(*flags)
  assert prepared.returncode == 0, prepared.stderr
  assert "train_pairs 60, heldout_pairs 14" in prepared.stdout
  assert "distinct_scenes 635840" in prepared.stdout
  assert "heldout_rare_rare 2" in prepared.stdout
  checked = command(*flags, "--check_leaks")
  assert checked.returncode == 0, checked.stderr
  assert "by facts: heldout_scenes 14, train_scenes 60, leaked_scene 0" in checked.stdout
  leaked = tmp_path / "raw" / "000000" / "pairs.jsonl"
  records = (tmp_path / "raw" / "000001" / "pairs.jsonl").read_text()
  with leaked.open("a") as file:
    file.write(records.splitlines()[0].replace('"split": "heldout"', '"split": "train"') + "\n")
  checked = command(*flags, "--check_leaks")
  assert "000000/pairs.jsonl has " in checked.stderr  # Instead of the bytes that were written.
  (tmp_path / "raw" / "done" / "000000.json").unlink()  # It has the digests.
  checked = command(*flags, "--check_leaks")
  assert checked.returncode == 2
  assert "heldout 'scenes/heldout/0000000' (scene): " in checked.stdout
  assert "error: 1 of 14 held-out scenes" in checked.stderr
