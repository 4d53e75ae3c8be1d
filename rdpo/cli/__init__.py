"""The command line: one command from prompts to a published model, one for each stage, and some to look at runs.

Exit codes: 0 done; 2 the job file or the input is wrong (one message, no traceback); 1 something
broke, and the same command resumes where it stopped.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from argparse import Namespace
from functools import partial

from rdpo.cli.failure import how_to_resume, report_failure
from rdpo.cli.parser import parse
from rdpo.cluster.interruption import heed_sigterm
from rdpo.errors import InputError
from rdpo.records import visible


def script() -> int:
    """What the `rdpo` command runs: `main`, and an end that native libraries cannot spoil; the exit code.

    Threads of Arrow that a read has left sometimes abort the process while the interpreter takes itself down, and a
    command that has done all its work ends with code 134 (apache/arrow issues 34314 and 39862).
    """
    codes: list[int] = []
    # What is registered first comes last, behind Ray's own end for one.
    atexit.register(partial(_end, codes))
    codes.append(main())
    return codes[0]


def _end(codes: list[int]) -> None:
    """End this process here, if `main` has said with which code."""
    if codes:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `rdpo` command; the exit code."""
    options = Namespace()
    # First of all: the notice that a machine is taken away may come while libraries are loading.
    heed_sigterm()
    # It says on some CPUs, when PEFT loads it, that a kernel for four bits is missing; nothing here needs that one.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        return int(options.function(options))
    except InputError as error:
        print(f"rdpo: {visible(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has gone (`rdpo show … | head`); Python would complain once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        print(f"\nrdpo: interrupted; {how_to_resume(options)}", file=sys.stderr)
        return 1
    except Exception as error:
        return report_failure(error, options)
