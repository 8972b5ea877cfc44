"""The old name of the command `deebert serve`."""

from deebert.errors import UserError
from deebert.options import refuse

if __name__ == "__main__":
    refuse(UserError("python -m deebert.serve is now: deebert serve key=value ..."))
