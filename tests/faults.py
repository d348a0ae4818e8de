"""Faults that single tests inject: what must happen -> tests, by module and name; each of their cases is one fault."""

_RUN, _RESUME, _SHELL = "engine/training/test_training::", "engine/training/test_resume::", "engine/test_command::"
_SAVE, _DAMAGE = "engine/checkpoints/test_checkpoint::", "engine/checkpoints/test_checkpoint_damage::"
_PEERS, _WORKERS = "engine/distributed/test_peers::", "dataloading/test_decode_workers::"
_TRAINER, _BAD, _STORAGE = "engine/training/test_trainer::", "dataloading/test_bad_images::", "engine/test_storage::"

FAULTS: dict[str, tuple[str, ...]] = {
    "A process of several is killed: all end, the cause is named, the run goes on from its checkpoint": (
        "engine/distributed/test_elastic::test_a_killed_worker_costs_no_more_than_the_steps_since_the_checkpoint",
        f"{_PEERS}test_the_others_say_who_has_ended_or_hangs_and_where_the_run_goes_on",
    ),
    "SIGTERM, SIGINT or SIGUSR1: the step is finished and saved; a second one ends at once": (
        f"{_RUN}test_a_broken_run_ends_in_the_same_bits",
        "engine/test_signals::test_a_signal_lets_the_step_finish_and_a_second_one_does_not",
        f"{_WORKERS}test_workers_leave_signals_to_their_parent",
    ),
    "A signal during an evaluation ends it at the next batch; it is made up": (
        "engine/training/test_evaluation::test_a_signal_ends_an_evaluation_at_its_next_batch",
        f"{_RESUME}test_an_evaluation_that_was_cut_short_is_made_up",
    ),
    "Killed at any call and any byte of a save: the newest whole checkpoint is found": (
        f"{_SAVE}test_a_kill_at_any_call_leaves_the_newest_whole_one",
        f"{_SAVE}test_a_kill_at_any_byte",
    ),
    "The disk is full, or the output folder read-only, a file, or gone": (
        f"{_SAVE}test_a_full_disk",
        f"{_TRAINER}test_a_disk_that_is_full_once_costs_a_checkpoint_and_at_the_end_the_success",
        f"{_TRAINER}test_an_output_folder_that_vanishes_costs_what_was_in_it",
        f"{_STORAGE}test_a_folder_that_cannot_be_made",
        f"{_SHELL}test_a_disk_that_is_full_leaves_no_empty_exit_json",
    ),
    "A truncated checkpoint is named and the one before taken; asked for by name, it is refused": (
        f"{_DAMAGE}test_a_truncated_file_is_named_and_the_one_before_taken",
    ),
    "A checkpoint of two processes continues on others in the same state": (
        "engine/distributed/test_global_batch::test_what_two_processes_saved_others_take_over",
    ),
    "A checkpoint of another format is named, a released one is read": (
        f"{_DAMAGE}test_another_format_version",
        f"{_DAMAGE}test_format_1_as_released_is_read",
    ),
    "Forged tensors and weight files of any kind run nothing and are named": (
        f"{_DAMAGE}test_forged_tensors_run_nothing",
        "model/test_weight_files::test_what_is_no_weight_file_is_named_in_our_words",
        "model/test_weight_files::test_a_bomb_is_refused_before_it_is_unpacked",
    ),
    "A run with another configuration is not continued; the differences are tabled": (
        f"{_RUN}test_a_run_with_another_configuration_is_not_continued",
        f"{_DAMAGE}test_what_does_not_fit_is_tabled",
    ),
    "Missing pretrained weights are named with key and remedies, before torch is loaded": (
        "model/test_pretrained::test_placeholders_are_named_with_key_and_remedies",
        "model/test_pretrained::test_it_is_found_before_torch_is_imported",
    ),
    "Bad images end the run with a list, or are replaced by the same person's": (
        f"{_BAD}test_error_ends_the_run_with_the_list",
        f"{_BAD}test_skip_replaces_a_bad_image_by_another_of_the_same_person",
        f"{_RUN}test_a_bad_image_is_named",
    ),
    "A file that turns bad during the run is tried again, then replaced": (
        "dataloading/test_fallback_reader::test_a_file_that_comes_back_is_waited_for",
        "dataloading/test_fallback_reader::test_a_file_turns_bad_in_the_middle",
    ),
    "Grey, CMYK, 16-bit, palette, progressive, turned and animated images are read as Pillow reads them": (
        "dataloading/test_decode::test_every_kind_of_file_is_what_pillow_reads",
    ),
    "A header that lies about the size costs no memory": (
        "dataloading/test_decode::test_a_lying_header_costs_no_memory",
        "dataloading/test_index::test_a_header_that_promises_more_than_the_file_can_hold_is_a_fault",
    ),
    "Persons with too few images repeat; too few persons are refused with the arithmetic": (
        "dataloading/test_plan::test_scarce_persons_repeat_and_all_their_images_serve",
        "dataloading/test_plan::test_too_few_persons",
        f"{_RUN}test_what_cannot_be_done_says_why",
    ),
    "Equal features, or a batch without partners: losses and gradients stay finite": (
        "kernels/test_triplet::test_equal_features_and_missing_partners_give_finite_losses_and_gradients",
    ),
    "A loss that is not finite, or overflows in fp16, changes no weight": (
        "engine/training/test_optim::test_a_non_finite_step_changes_nothing",
        f"{_TRAINER}test_an_overflow_names_its_own_step",
        f"{_RUN}test_fp16_survives_an_overflow_in_its_first_steps",
    ),
    "Features that are not finite are named and never ranked": (
        "engine/evaluation/test_extract::test_stored_rows_that_are_not_finite_are_named_and_nothing_is_replaced",
    ),
    "Mistakes in a configuration are told all at once, with line and rule": (
        "engine/test_config_yaml::test_all_mistakes_at_once",
        "engine/test_config_yaml::test_every_mistake_has_a_place_a_rule_and_what_came",
        f"{_SHELL}test_a_mistake_in_the_configuration_shows_before_torch_loads",
    ),
    "Folders that are not as they should be are named with the layout expected": (
        "dataloading/test_readers::test_wrong_folders_are_named_with_the_layout_expected",
    ),
    "A camera that training never saw is an error, or gets the mean embedding": (
        f"{_RUN}test_an_unseen_camera_is_an_error_or_the_mean",
    ),
    "Empty parts, queries without a match and ties are counted or refused": (
        "dataloading/test_records::test_an_empty_part_is_an_error",
        "engine/evaluation/test_retrieval::test_no_match_at_all_explains_the_camera_rule",
    ),
    "The same bytes twice, or in train and test, are told": (f"{_BAD}test_the_same_bytes_twice_in_one_part_are_told",),
    "Names with any bytes are read, and never move the cursor": (
        "dataloading/test_decode::test_names_with_any_bytes",
        "dataloading/test_readers::test_strange_names",
        "engine/test_text_log::test_no_name_of_a_file_is_a_command_to_the_terminal",
    ),
    "Links that lead back, pipes and devices among the images are named; nothing hangs": (
        "dataloading/test_folder::test_links_to_folders_are_followed_and_end",
        "dataloading/test_folder::test_every_image_is_used_or_named_with_the_reason",
    ),
    "Out of memory: code 6, and the settings that would fit": (
        "engine/monitoring/test_memory::test_a_step_that_does_not_fit",
        "engine/monitoring/test_memory::test_an_evaluation_that_does_not_fit_speaks_of_its_own_batch",
    ),
    "Two runs in one folder: the second is refused, a dead one's lock is free": (
        f"{_STORAGE}test_two_runs_in_one_folder",
    ),
    "The port of the run is taken: it is named with the remedy": (
        "engine/distributed/test_parallel::test_an_address_that_another_program_has_is_named",
    ),
    "Steps, not clocks, say which checkpoint is the newest": (
        f"{_SAVE}test_last_two_and_best_are_kept_by_step_not_by_clock",
    ),
    "The number of data workers changes nothing; one that is killed is an error": (
        "dataloading/test_loader::test_workers_change_nothing_and_serve_all_epochs",
        f"{_WORKERS}test_a_killed_worker_is_an_error",
    ),
    "No terminal, no reader, LANG=C, a full disk for the log, a tracker that is offline: the run goes on": (
        f"{_SHELL}test_stdout_without_a_reader",
        f"{_SHELL}test_stderr_without_a_reader",
        "engine/monitoring/test_metrics::test_nothing_that_a_log_meets_ends_a_training",
        "engine/monitoring/test_loggers::test_a_tracker_that_is_offline_costs_its_own_curves_alone",
        f"{_TRAINER}test_a_lost_log_is_told_on_resuming",
    ),
}
