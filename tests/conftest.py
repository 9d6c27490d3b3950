"""Fixtures for every test."""

import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# Spinning threads make small tests five times as slow on shared cores. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Otherwise Inductor tests this CPU's vector instructions in each process, which takes a second.
if sys.platform == "linux":
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# A shell's background job begins with SIGINT ignored, one under nohup with SIGHUP, and so would every program that a
# test starts and sends these.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import hypothesis
import torch

# Where there is no GPU, kernels in Triton's language run in its interpreter. Read where kernels are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
import caches  # noqa: F401  it sets variables
import programs  # it remembers the environment of now
from metal.plugin import mps, simulator

from xlstm_ray.cli.app import main
from xlstm_ray.threads import collect_seldom

__all__ = ["mps", "simulator"]

hypothesis.settings.register_profile("busy", deadline=None)  # a machine that is busy is not a failure
hypothesis.settings.load_profile("busy")

os.environ.pop("XDG_STATE_HOME", None)  # records of heads are under the HOME that a test gives

# pytest listens to loggers that do not propagate, and torch writes a line for each step of a compilation to a listener.
logging.getLogger("torch.__trace").propagate = True


# `./scripts/test fast` leaves these out: folders, files, fixtures or names. pyproject.toml explains the markers.
# Slow tests take some seconds of a core, most often for a process that imports torch.
MARKED = {
    "ray": """
        head
        test_grid test_grid_on_a_head test_lost_nodes test_supervisor test_dashboard test_container test_service_on_ray
        test_uneven test_spans test_fleet_ends test_the_services_configuration_is_what_serve_and_the_app_take
        test_parcels_on_ray
    """,
    "metal": "metal mps simulator",
    "compile": """
        test_autoscale
        test_parity_command
        test_transformers
        test_compiled_is_as_the_reference
        test_compiled_kernels_equal_float64
        test_a_window_of_padding_leaves_the_state_to_the_bit
        test_what_padding_holds_changes_no_bit
        test_20_000_tokens_with_gates_near_the_caps_equal_float64
        test_what_a_gate_at_its_cap_forgets_does_not_drift
        test_decayed_is_accurate_for_every_exponent
        test_log_sigmoid_is_accurate_over_the_whole_range_of_the_gates
        test_no_kernel_reads_memory_that_nobody_wrote
        test_a_graph_is_one_file_that_is_found_again_and_may_come_later
        test_the_code_is_the_same_and_headers_are_compiled_once
        test_without_guards_the_code_itself_refuses_other_shapes_and_strides_and_makes_few_calls
        test_the_need_of_integers_is_the_measured_peak
        test_a_token_of_few_rows_reads_a_blocks_weights_once_and_equals_float64
        test_a_second_compilation_of_a_kernel_is_refused
        test_compiled_kernels_of_many_threads_are_all_seen_to_run
        test_warm_up_command
        test_a_function_that_torch_skips_is_not_taken_for_a_compiled_one
        test_two_window_sizes_and_one_for_decoding_are_compiled_and_never_again
        test_compiled_splits_equal_the_reference
        test_a_compiled_batch_equals_one_by_one_and_resumes_to_the_bit
        test_nothing_is_read_that_nobody_wrote
        test_compiled_models_equal_transformers
        test_the_compiled_kernel_equals_float64_and_keeps_padding_out
        test_each_kind_of_block_is_compiled_once
        test_the_product_of_bfloat16_operands_is_not_rounded_to_bfloat16
        test_no_two_tokens_are_equally_likely_in_a_text
        test_this_machine_is_probed_and_checked_by_a_real_run
        test_a_damaged_compile_cache_is_one_line
        test_a_compile_cache_without_a_place_is_one_line
        test_each_phase_is_named_while_it_lasts
        test_without_warm_up_kernels_compile_on_first_use
    """,
    "slow": """
        test_bench
        test_bench_scaling
        test_bench_serve
        test_bad_requests
        test_batch
        test_cache
        test_client_commands
        test_clients
        test_completions
        test_documents
        test_documents_memory
        test_large_documents
        test_models
        test_chat_command
        test_score_command
        test_messages
        test_lm_eval
        test_a_broken_run_goes_on_and_nothing_half_written_is_there
        test_serve_command
        test_turn
        test_two_processes_on_one_directory_do_not_hurt_each_other
        test_an_answer_to_a_large_file_holds_nothing_of_it
        test_what_kill_9_leaves_is_all_that_prompts_go_on_from
        test_interrupted
        test_invariants
        test_lines
        test_load_serve
        test_other_clients
        test_outputs
        test_page
        test_tokens
        test_pace
        test_figures
        test_access
        test_serve_goals
        test_service
        test_slstm
        test_states
        test_every_odd_model_equals_transformers
        test_scoring_holds_a_few_logits_at_a_time_as_counted
        test_cancelled_requests_leave_the_others_bits_alone_and_nothing_behind
        test_requests_together_get_what_each_gets_alone_to_the_bit
        test_packages
        test_programs
        test_readme
        test_runners
        test_triton
        test_quality_of_the_demo_model
        test_pieces_give_the_tokens_of_the_whole
        test_the_loss_of_a_toy_falls_far_below_a_uniform_guess
        test_xlstm_ray_and_transformers_compute_what_was_trained
        test_evaluation_again_gives_the_same_figures
        test_a_row_longer_than_the_text_is_one_line
        test_a_text_on_standard_input_beside_a_prompt_is_told_and_left
        test_a_stopped_prefill_goes_on_by_the_command_that_it_prints
        test_standard_files_that_are_closed_or_full
        test_a_second_interrupt_does_not_wait_for_the_tile
        test_without_a_compiler_one_line_names_the_way_out
        test_a_closed_terminal_stops_a_prefill_at_a_tile_boundary_with_a_state
        test_the_first_token_from_the_prompt_and_from_the_command
        test_as_a_module_of_python
        test_a_bar_on_a_terminal
        test_the_same_prompt_from_option_file_and_standard_input
        test_an_interrupted_generation_keeps_what_it_made
        test_an_interrupt_before_the_first_tile_ends_it_at_once
        test_a_reader_that_goes_early_is_no_error_worth_a_traceback
        test_mistakes_are_answered_without_torch
        test_a_corrupted_model_is_refused_or_gives_the_same_results
        test_an_answer_is_printed_when_its_group_has_ended
        test_two_thousand_prompts_need_what_their_windows_take
        test_cluster_files_are_what_rays_launcher_takes
        test_a_large_file_is_appended_without_holding_it
        test_what_a_file_appends_is_what_its_text_does
        test_pieces_joined_are_what_decoding_makes_of_all
        test_text_that_is_given_in_between_is_not_printed
        test_a_long_text_is_not_encoded_at_once
        test_one_endless_word_is_not_encoded_at_once
        test_a_long_text_takes_little_memory_before_the_first_tile
        test_memory_of_a_head_that_is_the_embedding
        test_products_are_timed_once_and_remembered
        test_any_tiles_and_bands_give_the_same
        test_any_resumes_on_the_way_give_the_same
        test_rows_of_any_lengths_equal_one_by_one_also_when_they_grow
        test_peak_memory_of_64_tiles_is_that_of_4
        test_loading_holds_the_weights_once
        test_a_state_file_is_whole_or_absent_whenever_its_writer_is_killed
        test_over_the_soft_limit_tiles_then_chunks_are_halved_and_the_state_says_so
        test_over_the_hard_limit_the_run_stops_at_a_tile_and_goes_on_later_to_the_same_bits
        test_a_run_that_cannot_fit_is_refused_with_the_arithmetic_unless_forced
        test_the_computed_need_is_the_measured_peak_within_15_percent
        test_20_000_tokens_with_extreme_gates_equal_float64
        test_any_numerics_and_rows_that_grow_from_state_to_state_give_the_same
        test_sampling_follows_the_probabilities_and_keeps_to_its_limits
        test_scoring_8k_tokens_of_a_50k_vocabulary_holds_a_piece
        test_each_option_reaches_the_answer
        test_ctrl_c_stops_the_answer_and_keeps_it_and_a_second_one_leaves
        test_at_the_prompt_ctrl_c_asks_once_and_ctrl_d_leaves
        test_a_signal_to_leave_keeps_the_conversation
        test_score_command
        test_lm_eval
        test_memory_is_flat
        test_threads_that_wait_for_each_other_sleep_soon
        test_torchs_own_variables_are_passed_on
        test_memory_and_settings_are_the_engines
        test_rows_of_a_batch_answer_as_alone
        test_a_state_that_does_not_fit_is_refused_with_the_reason
        test_greedy_decoding_equals_transformers
        test_without_shrinking_a_soft_limit_only_warns
        test_config_prints_values_and_where_they_came_from
        test_a_switch_of_a_file_can_be_undone_by_a_flag
        test_a_variable_that_is_not_ours_is_told_once
        test_a_python_program_is_told_of_each_variable_once
        test_a_run_that_shrinks_before_its_first_tile_is_the_run_of_the_smaller_sizes
        test_what_is_advised_makes_that_smaller_which_is_too_large
        test_a_save_that_fails_leaves_the_file_that_was_there_and_nothing_else
        test_a_setting_changes_the_run_or_is_refused
    """,
}


# The longest files, those that wait between those that compute. What test_grid compiles, test_slstm finds later.
LONGEST = """
    test_lost_nodes test_grid test_kernels test_grid_on_a_head test_quantized test_supervisor test_uneven test_launches
    test_service_on_ray test_fleet_ends test_score_and_chat_on_a_grid test_spans test_interrupted
    test_check_on_mac test_container test_parity test_invariants test_slstm test_program test_memory test_readme
    test_cli
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, so that parallel workers end at about the same time."""
    longest = LONGEST.split()
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))
    markers = {name: marker for marker, names in MARKED.items() for name in names.split()}
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).with_suffix("").parts
        names = {*place, item.name.partition("[")[0], *getattr(item, "fixturenames", ())}
        for name in sorted(names & set(markers)):
            item.add_marker(markers[name])


def pytest_collectstart() -> None:
    """Import all tests without garbage collection, which took a quarter of it."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Keep imported objects out of garbage collection: otherwise it takes a tenth of each compilation."""
    gc.freeze()
    collect_seldom()
    gc.enable()


class Ran(NamedTuple):
    """The exit code and output of a run of the program."""

    code: int
    out: str
    err: str

    @property
    def row(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self.code == 0, self
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def error(self) -> str:
        """The error line; nothing else was printed."""
        assert self.code != 0, self
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The program, in this process."""

    def call(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["xlstm-ray", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capfd.readouterr()
        return Ran(left.value.code or 0, out, err)

    return call


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    """What a library sets in the environment is not what the programs of later tests start with."""
    yield
    programs.forget_leftovers()


@pytest.fixture
def eager() -> Iterator[None]:
    """Compiled kernels run as plain torch, so that many shapes can be tested without compiling."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """New memory holds NaN, in torch and in compiled code; yields the sizes of the buffers of compiled code."""
    asked: list[int] = []
    plain = torch._C._dynamo.guards._empty_strided_cpu

    def empty_strided(size: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
        out = plain(size, stride, dtype)
        asked.append(out.numel())
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(torch.iinfo(dtype).max)

    # Compiled modules take the function by this name when they are loaded, so only kernels compiled here see it.
    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cpu", empty_strided)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield asked
    torch.use_deterministic_algorithms(False)
