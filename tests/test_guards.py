import signal
import threading

import pytest
import torch

from spd_lens.guards import frozen, interrupts_wait, reproducible


def test_a_frozen_model_comes_back_as_it_was():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise RuntimeError
    assert model.weight.requires_grad and not model.bias.requires_grad


def test_reproducible_is_given_back():
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError), reproducible():
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_interrupt_waits_and_a_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with interrupts_wait() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_left_alone():
    seen = []

    def work():
        with interrupts_wait() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
