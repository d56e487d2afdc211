"""What only `python dev/test.py --all` runs, and what of the same is tested without it."""
from __future__ import annotations

import re

# a test's name, or of its cases those whose id this expression finds: a test that is not slow, or other cases
SLOW = {
    "test_a_short_campaign_finds_no_fault[kills|files|prompts]": "other cases",
    "test_the_example_workflows_run_with_every_sampler":
        "test_an_example_runs_on_the_tiny_checkpoint_and_its_image_restores_it",
    "test_an_example_runs_on_the_tiny_checkpoint_and_its_image_restores_it[few|compare|amed|hypersolver]":
        "other cases",
    "test_the_emoji_model_is_measured_in_bfloat16_as_in_float32": "test_the_dry_run_makes_the_table",
    "test_any_sampler_is_led[lambda_fitted|lambda_v3]": "other cases",
    "test_context_windows_work_while_a_video_model_is_measured_and_sampled[amed]": "other cases",
    "test_the_opening_from_pure_noise_errs_less_than_the_tolerance[1e-05|0.05]": "other cases",
    "test_where_new_numbers_are_tried_such_an_answer_says_that_they_are_bad[refit_multistep]": "other cases",
    "test_it_is_used_for_its_guidances_and_numbers_of_steps":
        "test_a_run_uses_it_says_so_and_warns_only_where_it_does_not_fit",
    "test_a_predictor_is_no_worse_than_its_table_and_runs_every_image_by_itself":
        "test_a_predictor_of_zero_is_its_table",
    "test_training_lowers_the_error_at_the_end_and_spends_its_budget_at_most[euler|dpm_2|ipndm|3m]":
        "other cases",
    "test_a_model_that_does_not_answer_for_itself_is_refused_and_what_wraps_it_named[amed]": "other cases",
    "test_telling_levels_leaves_the_caller_s_options_as_they_were[amed]": "other cases",
    "test_other_sizes_single_conds_and_batches_work_with_one_training":
        "test_a_predictor_is_trained_on_a_model_that_takes_the_run_s_batch_and_no_more",
    "test_the_share_of_the_colour_that_is_led_to_rises_with_the_scale":
        "test_a_run_with_the_exact_classifier_is_the_conditional_model_s",
    "test_checkpoints_in_low_precision_sample_as_in_float32":
        "test_the_result_has_the_input_s_precision_and_the_input_is_left_alone",
    "test_the_fingerprint_is_the_same_in_every_precision":
        "test_a_checkpoint_keeps_its_fingerprint_in_other_formats_and_in_other_versions_of_comfyui",
    "test_a_flow_model_with_trained_weights_makes_an_image[pc]": "other cases",
    "test_half_precision_is_trained_and_sampled":
        "test_models_in_half_precision_are_measured_refitted_and_trained",
    "test_another_schedule_guidance_or_base_is_trained_anew":
        "test_another_guidance_is_measured_anew_and_a_near_one_is_not",
    "test_from_nothing_it_is_trained_once_saved_and_found_again[2m]": "other cases",
    "test_a_predictor_sees_the_conditional_half_of_a_batch":
        "test_the_middle_block_is_seen_for_the_conditional_half_however_conds_are_evaluated",
    "test_a_predictor_reads_conds_that_are_evaluated_together_or_not":
        "test_a_predictor_is_trained_on_a_model_that_takes_the_run_s_batch_and_no_more",
    "test_cancel_while_training_leaves_a_partial_file_from_which_the_next_run_goes_on":
        "test_cancel_while_measuring_leaves_a_partial_file_from_which_the_next_run_goes_on",
    "test_what_several_prompts_taught_is_used_for_every_prompt":
        "test_but_not_without_what_several_prompts_taught",
    "test_a_cancelled_refit_goes_on_from_what_was_done":
        "test_cut_short_it_goes_on_from_the_last_part_that_was_done",
    "test_a_cancelled_training_goes_on_from_what_was_done":
        "test_it_goes_on_from_wherever_it_was_cut_short_and_ends_alike",
    "test_cancelled_it_goes_on_with_what_was_done":
        "test_it_goes_on_from_wherever_it_was_cut_short_and_ends_alike",
    "test_what_was_kept_of_another_refit_is_not_used[noise|statistics|description]": "other cases",
    "test_cut_short_it_goes_on_from_the_last_part_that_was_done[round]": "other cases",
    "test_a_refit_is_used_for_its_number_of_steps_alone": "test_only_whole_runs_of_that_many_steps_use_it",
    "test_a_guider_with_a_rule_of_its_own_is_measured_by_itself":
        "test_without_guidance_every_guider_takes_what_another_or_the_nodes_have_measured",
    "test_the_worse_the_images_the_farther_they_are[blur|contrast]": "other cases",
    "test_every_stage_refines_the_same_image[2S midpoint|with corrector]": "other cases",
    "test_it_is_trained_and_says_before_what_it_costs_and_after_what_it_gained":
        "test_it_is_taught_from_nothing_in_calls_of_the_run_s_batch_and_says_before_what_it_costs",
    "test_a_flow_model_is_fitted_and_refitted_from_pure_noise": "test_flow_learns_what_ve_does",
    "test_a_cache_does_not_answer_for_the_model_while_it_is_measured[amed|Lazy]": "other cases",
    "test_the_run_that_measures_makes_the_image_of_all_later_ones_under_hook_keyframes_too[amed|fitted]":
        "other cases",
    "test_a_model_that_a_node_has_changed_is_measured_by_itself[Rescale|True]": "other cases",
    "test_sampler_and_sigmas_make_the_image_of_the_cell_that_was_chosen[amed]": "other cases",
}
INTERFACE, OPPOSITE = "newest-nodes2", "pinned-classic"
BOTH_ENDS = ("test_an_edited_step_count_is_seen_at_once_on_the_sampler",
             "test_ksampler_shows_a_panel_for_our_names_only",
             "test_a_small_ksampler_grows_for_all_that_its_panel_says_and_shrinks_again",
             "test_every_example_runs_by_the_run_button_and_shows_its_evaluations[ksampler]",
             "test_a_collapsed_sampler_hides_its_panel_and_shows_it_again")
"""What the kind of nodes makes a difference to. All of the browser's tests run in INTERFACE, the newest with
Nodes 2.0; with --all these in all four interfaces, and in OPPOSITE all but the examples' runs and what opens
the page anew. What is left is THOROUGH: it runs when it is named, as in python dev/test.py tests/browser."""
OPENS_PAGE = ("test_a_server_that_says_nothing", "test_after_a_reload")
LONG = (*OPENS_PAGE, "test_a_sampler_without_statistics", "by_the_run_button", "saved_and_loaded_again")
BUT = {"by_the_run_button": ("-ksampler", "-sampler_node"),
       "saved_and_loaded_again": ("-ksampler", "-few_steps")}
"""What of the browser's tests takes long, but for these examples."""
QUICK, SLOW_REST, THOROUGH = "quick", "slow", "thorough"


def function(key: str) -> str:
    return key.partition("[")[0]


def matches(key: str, name: str) -> bool:
    """Whether a key of SLOW, or a name of BOTH_ENDS, means the test of this name."""
    cases = key.partition("[")[2].removesuffix("]")
    case = name.partition("[")[2]
    return function(key) == function(name) and bool(re.search(cases, case))


def part(name: str, browser: bool) -> str:
    """QUICK, SLOW_REST or THOROUGH."""
    if not browser:
        return SLOW_REST if any(matches(key, name) for key in SLOW) else QUICK
    if INTERFACE in name:
        long = any(key in name and not any(example in name for example in BUT.get(key, ())) for key in LONG)
        return SLOW_REST if long else QUICK
    both, runs = any(matches(key, name) for key in BOTH_ENDS), "by_the_run_button" in name
    opens = any(name.startswith(load) for load in OPENS_PAGE)
    return SLOW_REST if both or OPPOSITE in name and not runs and not opens else THOROUGH
