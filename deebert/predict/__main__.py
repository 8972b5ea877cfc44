"""The old name of the command `deebert predict`."""

from deebert.errors import UserError
from deebert.options import refuse

if __name__ == "__main__":
    refuse(UserError("python -m deebert.predict is now: deebert predict key=value ..."))
