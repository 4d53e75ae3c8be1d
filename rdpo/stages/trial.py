"""The rewards tried on known pairs, before any long work."""

from __future__ import annotations

from typing import Any

from rdpo.execution.run import Run
from rdpo.files.stage_folder import StageFolder, write_rows
from rdpo.records import ID_COLUMN
from rdpo.tracking.console import Meter


def try_rewards(run: Run, folder: StageFolder, meter: Meter) -> dict[str, Any]:
    """The rewards on known pairs; how often each prefers the side it should.

    Raises:
        InputError: one cannot be had, or gives no numbers.
    """
    from rdpo.preference.calibration import calibrate, check_calibration, right_sides, tried_rewards

    folder.clear_parts()
    for rows in calibrate(run.job) if tried_rewards(run.job) else ():
        write_rows(rows, folder, ID_COLUMN, lambda block: meter.advance(block.rows + block.dropped))
    check_calibration(folder.count(), folder.reasons(), run.job)
    shares = right_sides(folder.tables(), run.job)
    for reward, share in shares.items() if run.job.calibration.source else ():
        run.console.say(f"{'':<12}{reward} prefers the better answer in {share:.2f} of the known pairs")
    return {"right": shares}
