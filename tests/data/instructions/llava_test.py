from cm3leon_jax.data.instructions.files import open_records
from cm3leon_jax.data.instructions.records import Record
from tests.data.instruction_releases import turns, write
from tests.data.instructions.files_test import read


def test_llava_one_record_an_answer_with_the_turns_before_it(tmp_path):
  bus, color, new, street = read(tmp_path, "llava")
  name = "000000033471.jpg"
  image = {"image": f"{tmp_path}/train2017/{name}"}
  assert bus == Record("1/0", name, {"instruction": "What is it?", "answer": "A bus."}, image)
  assert color == Record(
    key="1/1",
    group=name,
    texts={
      "instruction": "Human: What is it?\nAssistant: A bus.\nHuman: Which color?",
      "answer": "Red and\nwhite.",
    },
    images=image,
  )
  earlier = "Human: What is it?\nAssistant: A bus.\nHuman: Which color?\nAssistant: Red and\nwhite."
  assert new.texts == {"instruction": f"{earlier}\nHuman: Is it new?", "answer": "No."}
  # The second entry has no image, and the third has the same id as the first.
  assert (street.key, street.group) == ("3/0", name)
  assert street.texts == {"instruction": "Describe it.", "answer": "A street."}


def test_llava_blank_answers_are_left_out_and_stay_in_the_conversation(tmp_path):
  said = turns("<image>\nA?", " ", "B?", "b")
  content = [{"id": 5, "image": "coco/train2017/1.jpg", "conversations": said}]
  write(tmp_path, {"llava_v1_5_mix665k.json": content})
  (record,) = open_records("llava", tmp_path, "llava_v1_5_mix665k")
  assert record.key == "1/1"
  assert record.texts["instruction"] == "Human: A?\nAssistant: \nHuman: B?"
  assert record.images["image"] == f"{tmp_path}/coco/train2017/1.jpg"
