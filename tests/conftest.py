"""Settings for all tests: no test downloads anything or writes outside temporary folders.

A test is `quick` unless it is `slow`, `gpu` or named in LONG, which lists tests of more than about three seconds.
"""

import os
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
    os.environ.pop("COLUMNS", None)  # output is a file unless a test says otherwise

import pytest  # noqa: E402
import torch  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache.name  # text heads are cached there

# files, or functions whose cases together take that long
LONG = {
    "test_alone.py",
    "test_analysis.py",
    "test_analysis_merges.py",
    "test_baselines.py::test_rows_with_settings_of_training",
    "test_became.py::test_three_tasks_equal_plain_loops",
    "test_bench.py::test_quick_rows_are_complete",
    "test_bench.py::test_unknown_size_is_named",
    "test_bench_gpu.py",
    "test_checkpoint.py::test_a_full_disk_leaves_the_old_file",
    "test_cli.py",
    "test_commands.py",
    "test_compiled.py",
    "test_config.py::test_defaults_that_the_data_and_the_model_decide",
    "test_continue.py",
    "test_cuda.py",
    "test_cuda_walk.py",
    "test_data_joined.py::test_a_data_set_is_added_to_a_finished_sequence",
    "test_data_joined.py::test_methods_on_data_sets_that_share_classes",
    "test_docs.py",
    "test_dtensor.py",
    "test_elementwise.py::test_dtypes",
    "test_elementwise.py::test_nonfinite_values_are_counted",
    "test_elementwise.py::test_pam_coefficient",
    "test_elementwise.py::test_sizes",
    "test_flat.py::test_torch_compile_keeps_the_views",
    "test_gpu.py",
    "test_hide.py::test_three_tasks_equal_a_plain_loop",
    "test_identity.py::test_bad_images_may_be_skipped_from_where_the_run_stopped",
    "test_identity.py::test_changed_contents_are_refused",
    "test_identity.py::test_every_setting_is_compared_or_named_as_free",
    "test_identity.py::test_nothing_learned_is_nothing_to_protect",
    "test_identity.py::test_the_same_contents_elsewhere_are_the_same_run",
    "test_imagenet_run.py",
    "test_inputs.py::test_skipped_images_are_counted_and_a_lost_class_is_a_warning",
    "test_inputs.py::test_what_the_model_cannot_serve_is_said_before_anything_is_trained",
    "test_interpreter.py",
    "test_leftovers.py",
    "test_lists.py::test_dare",
    "test_lists.py::test_dare_draws_the_masks_of_the_stream",
    "test_lists.py::test_fisher_average",
    "test_lists.py::test_in_place_and_counted",
    "test_lists.py::test_magmax",
    "test_lists.py::test_one_model",
    "test_lists.py::test_results_do_not_depend_on_threads",
    "test_lists.py::test_unaligned_models",
    "test_lists.py::test_weighted_sum",
    "test_merge_about.py",
    "test_merge_extract.py::test_peft_computes_the_merged_model_with_it",
    "test_merge_files.py",
    "test_merge_gpu.py",
    "test_merge_inputs.py::test_a_killed_merge_goes_on",
    "test_merge_inputs.py::test_an_adapter_is_the_product_on_the_base",
    "test_merge_inputs.py::test_the_page_about_merging",
    "test_merge_peers.py",
    "test_merge_refusals.py::test_a_value_that_is_not_finite",
    "test_merge_statistics.py",
    "test_merge_sweep.py",
    "test_merging_lora.py::test_every_rule_merges_what_moved_and_nothing_else",
    "test_method_cmm.py::test_linearised_serves_both_families",
    "test_method_pam.py::test_lora_equals_peft_on_separate_projections",
    "test_method_trm.py::test_state_goes_on_in_a_new_search",
    "test_methods.py::test_a_checkpoint_inside_a_phase_is_a_file",
    "test_methods.py::test_progress_counts_epochs_to_their_number",
    "test_methods.py::test_the_model_is_charged_once",
    "test_methods.py::test_what_is_kept_is_enough_to_go_on",
    "test_micro_batch.py::test_every_phase_of_every_method",
    "test_micro_batch.py::test_the_search_on_a_vit",
    "test_names_and_prompts.py::test_a_run_says_what_it_found_and_names_what_it_compares_with",
    "test_parts.py",
    "test_peers.py",
    "test_posthoc.py::test_every_start_with_every_deployment_equals_a_plain_loop",
    "test_posthoc.py::test_what_a_row_may_set",
    "test_precision.py",
    "test_prefix_tuning.py",
    "test_prompt_methods.py",
    "test_prompts.py::test_a_compiled_pass_takes_prompts_as_inputs",
    "test_ranks.py",
    "test_readme.py",
    "test_recompute.py",
    "test_registration.py",
    "test_reproduce.py::test_a_column_that_fails",
    "test_reproduce.py::test_a_column_that_fails_in_another_process",
    "test_reproduce.py::test_a_figure_is_drawn_once",
    "test_reproduce.py::test_a_process_of_several_trains_and_writes_no_table",
    "test_reproduce.py::test_a_table_from_end_to_end",
    "test_resume.py",
    "test_sampling.py::test_dare",
    "test_saved.py",
    "test_sinks.py",
    "test_statistics.py",
    "test_step_memory.py",
    "test_stock.py::test_equals_the_definition",
    "test_stock.py::test_segment_norms",
    "test_stock.py::test_task_vectors_that_point_apart",
    "test_sweep.py",
    "test_threshold.py::test_threshold_equals_sorting",
    "test_threshold.py::test_threshold_of_many_ties",
    "test_threshold.py::test_values_that_mislead_a_sample",
    "test_ties.py::test_half_precision_models",
    "test_ties.py::test_list_and_stream_give_the_same_bits",
    "test_ties.py::test_mixed_types",
    "test_transfer.py",
    "test_trm.py::test_merge_and_sums_dtypes",
    "test_trm.py::test_merge_and_sums_offsets",
    "test_trm.py::test_merge_and_sums_sizes",
    "test_trm.py::test_ratio_ends",
    "test_trm_objective.py",
    "test_wheel.py",
}


@pytest.fixture(scope="module", autouse=True)
def unrendered(request):
    """Runs draw nothing, which would take most of a small run's time; `rendered` undoes it."""
    if request.path.parent.name == "kernels":
        yield
        return
    from fastmerge import page, plots

    real = plots.draw, page.figures, page.svg
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: [])
        patch.setattr(page, "figures", lambda *_: [("accuracy", None)])
        patch.setattr(page, "svg", lambda figure: "")
        yield real


@pytest.fixture
def rendered(unrendered, monkeypatch):
    """For tests of the plots and of the report."""
    for name, real in zip(("plots.draw", "page.figures", "page.svg"), unrendered, strict=True):
        monkeypatch.setattr(f"fastmerge.{name}", real)


def pytest_collection_modifyitems(items):
    for item in items:
        names = {item.path.name, f"{item.path.name}::{item.originalname}"}
        if not names & LONG and not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.quick)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
