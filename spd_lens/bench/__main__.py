"""`python -m spd_lens.bench NAME SETTINGS`: one configuration in this process; see `measure.in_own_process`."""

import contextlib
import json
import sys

from spd_lens.bench import BENCHES

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the line
        line = BENCHES[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(line))
