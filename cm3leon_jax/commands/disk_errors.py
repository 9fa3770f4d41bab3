"""Errors of a disk that does not read or write a file, as Python and the libraries raise them."""

import errno
import os
import re

# The content of the file stays unknown, as it may be there, and whole; or the disk is read-only.
NOT_READ = (
  errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE,
  errno.EROFS,
)  # fmt: skip
REASONS = "|".join(re.escape(os.strerror(number)) for number in NOT_READ)
# Of TensorStore, and of ArrayRecord.
FORMATS = (
  re.compile(rf'local file "(?P<file>[^"]*)": .*?(?P<reason>{REASONS})'),
  re.compile(rf"^\w+\(\) failed: (?P<reason>{REASONS}); \w+ (?P<file>[^;]*)"),
)


def failure(error: Exception) -> str:
  """Says which file a disk did not read or write; "" if `error` is another one.

  failure(PermissionError(errno.EACCES, "Permission denied", "run/x"))
  "run/x could not be read or written (Permission denied)"
  """
  if isinstance(error, OSError) and error.errno in NOT_READ and error.filename:
    return f"{error.filename} could not be read or written ({error.strerror})"
  if type(error) not in (RuntimeError, ValueError, OSError):
    return ""
  for pattern in FORMATS:
    if found := pattern.search(str(error)):
      return f"{found['file']} could not be read or written ({found['reason']})"
  return ""
