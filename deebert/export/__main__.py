"""The old name of the command `deebert export`."""

from deebert.errors import UserError
from deebert.options import refuse

if __name__ == "__main__":
    refuse(UserError("python -m deebert.export is now: deebert export key=value ..."))
