"""The order of rows follows from seed and epoch, also where a run goes on in the middle of an epoch."""

from __future__ import annotations

import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from camex_ft.training.batches import EpochSampler, set_epoch

ROWS, BATCH, SKIPPED = 16, 2, 2


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_of_an_epoch_that_is_gone_on_with(processes: int) -> None:
    lengths = [3 + n % 5 for n in range(ROWS)]
    sampler = EpochSampler(LengthGroupedSampler(BATCH, lengths=lengths), seed=1)
    loader = prepare_data_loader(
        DataLoader(list(range(ROWS)), batch_size=BATCH, sampler=sampler),
        num_processes=processes,
        process_index=0,
        put_on_device=False,
    )
    loader.set_epoch(3)  # as the Trainer does
    whole = [batch.tolist() for batch in loader]
    sampler.epoch = 0
    set_epoch(loader, 3)
    skipped = skip_first_batches(loader, SKIPPED)
    skipped.set_epoch(3)
    assert [batch.tolist() for batch in skipped] == whole[SKIPPED:]
    loader.set_epoch(0)
    assert [batch.tolist() for batch in loader] != whole
