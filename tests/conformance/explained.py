"""Which of PEFT's tests do not apply, why that is right, and which test of ours covers the ground instead.

Patterns are ``test`` or ``test[case]`` with ``*``, from some ``::`` of the test's name on (`ledger.matches`).
"""

from __future__ import annotations

from dataclasses import dataclass

REFUSALS = "tests/tuners/test_refusals.py::"
CONFIG = "tests/tuners/test_config.py::"
CLASSES = REFUSALS + "test_a_class_that_cannot_be_adapted"
OPTIONS = CONFIG + "test_an_option_that_contradicts_the_method_is_refused"
SURFACE = "tests/peft_host/test_surface.py::test_the_call_gives_what_a_user_of_lora_expects"


@dataclass(frozen=True)
class Deselected:
    """Tests that assert what is not so, by design, for these methods; they are not run."""

    tests: tuple[str, ...]
    why: str
    instead: str  # path::test of ours


@dataclass(frozen=True)
class Skipped:
    """Tests that PEFT's own code skips."""

    tests: tuple[str, ...]
    reason: str  # a regular expression of PEFT's reason
    why: str
    instead: str


DESELECTED: tuple[Deselected, ...] = (
    # -- what off-principal LoRA adapts ---------------------------------------------------------------------------
    Deselected(
        (
            "TestPeftCustomModel::test_save_pretrained_targeting_lora_to_embedding_layer*",
            "TestDecoderModels::test_save_pretrained_targeting_lora_to_embedding_layer*",
            "test_load_resized_embedding_ignore_mismatched_sizes",
            "test_lora_embed_scale_is_applied*",
            "test_merge_and_unload_fixes_tie_word_embeddings_config",
            "TestBaseTunerWarnForTiedEmbeddings::test_*warn_for_*tied_embeddings_merge",
            "test_repr_lora_embedding",
            "test_requires_grad_lora_emb_conv1d",
            "test_mixed_adapter_batches_lora_conv1d_emb*",
            "test_targeting_trainable_tokens_raises",
            "TestModelAndLayerStatus::*_large",
            "TestModelAndLayerStatus::test_*enabled_irregular",
            "TestModelAndLayerStatus::test_*requires_grad*_irregular",
            "TestModelAndLayerStatus::test_model_active_adapters_irregular",
            "TestModelAndLayerStatus::test_model_merged_adapters_irregular",
            "TestModelAndLayerStatus::test_model_with_injected_layers",
        ),
        "the adapter sits on an embedding, which has no singular bases here (two of PEFT's models mix them in)",
        CLASSES,
    ),
    Deselected(
        (
            "test_repr_lora_conv2d",
            "test_requires_grad_lora_conv2d",
            "test_mixed_adapter_batches_lora_conv2d",
            "test_self_targeting_is_ignored[OffPrincipal-config_kwargs1]",
        ),
        "the adapter sits on a convolution",
        CLASSES,
    ),
    Deselected(
        ("test_unload_adapter_multihead_attention", "test_mha_gradients_set_correctly", "*_mha_raises"),
        "the adapter sits on a MultiheadAttention",
        CLASSES,
    ),
    Deselected(
        ("TestDynamicDispatch::*",),
        "custom layers for classes that LoRA does not know; a class outside Linear and Conv1D is refused",
        CLASSES,
    ),
    # -- options of LoRA that off-principal LoRA refuses ----------------------------------------------------------
    Deselected(
        ("*dora*", "test_monteclora_*", "test_kasa_does_not_support_lora_conversion", "*NestedConfigRoundTrip::*"),
        "DoRA, MonteCLoRA, KaSA and the other variants' configs are refused",
        OPTIONS,
    ),
    Deselected(
        (
            "test_lora_safe_merge_does_not_mutate_base_layer_on_non_finite_bias",
            "test_merge_with_lora_bias_when_base_layer_has_no_bias_warns_and_raises",
            "test_get_and_set_peft_model_state_dict_bias_in_module_name",
            "test_adding_multiple_adapters_with_bias_raises[*OffPrincipal*]",
            "test_adding_multiple_adapters_with_bias_raises[lora*]",
            "test_adding_multiple_adapters_with_bias_raises[tokens*]",
            "test_adding_multiple_adapters_with_bias_raises[projected*]",
            "test_adding_multiple_adapters_with_bias_raises[pissa*]",
            "test_save_shared_tensors",
        ),
        "bias and lora_bias are refused by the config itself",
        OPTIONS,
    ),
    Deselected(
        (
            "test_repr_lora_paramwrapper",
            "TestTargetedParameterNames::*",
            "test_inject_from_state_dict_transformers_target_parameters_*",
            "TestModelAndLayerStatus::*target_parameters*",
        ),
        "target_parameters is refused",
        OPTIONS,
    ),
    Deselected(("test_lora_layer_replication",), "layer_replication is refused", OPTIONS),
    Deselected(
        (
            "test_add_weighted_adapter_negative_weight_negates_adapter",
            "test_add_weighted_adapter_subtraction_with_negative_weights",
            "test_add_weighted_adapter_with_different_scaling[svd*]",
            "test_add_weighted_adapter_with_different_scaling[*linear*]",
            "test_add_weighted_adapter_with_different_scaling[*ties*]",
            "test_add_weighted_adapter_with_different_scaling[*magnitude_prune*]",
            "test_multiple_adapters_*modules_to_save_merging_adapters*",
            "test_weighted_combination_of_adapters[lora*]",
            "test_weighted_combination_of_adapters[tokens*]",
            "test_weighted_combination_of_adapters[projected*]",
            "test_weighted_combination_of_adapters[pissa*]",
        ),
        "the product of combined factors is not the combination of the updates, so these combinations are refused (and "
        "svd keeps rank r of updates of rank 2r)",
        SURFACE,
    ),
    Deselected(
        ("test_add_adapter_rejects_duplicate_name_without_mutation[True]", "test_mixed_model_raises"),
        "PeftMixedModel admits only PEFT's own methods",
        SURFACE,
    ),
    # -- what differs by design -----------------------------------------------------------------------------------
    Deselected(
        ("test_from_pretrained_config_construction",),
        "asserts that the model holds the caller's config object; both methods hold a copy, so that one config serves "
        "many models",
        "tests/tuners/test_config_reuse.py::test_one_config_serves_two_architectures",
    ),
    Deselected(
        ("test_only_params_are_updated[*-Sparse-*]",),
        "while a sparse adapter is active the base weight holds its values; the base's own bytes come back",
        "tests/tuners/test_sparse_lifecycle.py::test_the_base_comes_back_bit_for_bit",
    ),
    Deselected(
        (
            "test_adapter_dtype_autocast[*-False-dtype0-Off-principal*projected*]",
            "test_adapter_dtype_autocast[*-False-dtype1-Off-principal*projected*]",
            "test_add_adapter_no_autocast_adapter_dtype[*-projected-*]",
        ),
        "bases stay in fp32 without autocast_adapter_dtype: rounded to 16 bits they are other bases",
        "tests/tuners/test_loading.py::test_adapters_in_the_base_dtype_come_back_in_it",
    ),
    Deselected(
        (
            "test_adapter_dtype_autocast[*-False-dtype0-Sparse*]",
            "test_adapter_dtype_autocast[*-False-dtype1-Sparse*]",
            "test_add_adapter_no_autocast_adapter_dtype[*-sparse-*]",
        ),
        "packed values have the dtype of their precision, whatever the base's is",
        "tests/tuners/test_sparse_running.py::test_a_cast_of_the_model_leaves_the_update_alone",
    ),
    Deselected(
        (
            "test_loading_model_requires_grad_set_correctly[*-OffPrincipal]",
            "test_loading_model_with_modules_to_save_requires_grad_set_correctly[True-OffPrincipal]",
            "test_loading_model_with_trainble_tokens_requires_grad_set_correctly[True]",
        ),
        "asserts that all tensors of a loaded adapter train; starts are frozen (with LoRA's start these tests run)",
        "tests/tuners/test_several_adapters.py::test_only_the_active_adapters_factors_ever_train",
    ),
    Deselected(
        (
            "TestDefaultTargetModules::test_default_target_modules_not_set*",
            "TestDefaultTargetModules::test_default_target_modules_list_of_str",
            "TestDefaultTargetModules::test_default_target_modules_str",
            "test_module_matching_lora",
            "TestTargetedModuleNames::test_realistic_example",
            "TestExcludedModuleNames::test_realistic_example",
        ),
        "asserts LoRA's default targets of an architecture; both methods' default is all-linear",
        "tests/tuners/test_config_reuse.py::test_one_config_serves_two_architectures",
    ),
    Deselected(
        ("test_repr_lora_linear", "test_repr_lora_conv1d", "test_module_type_small", "test_adapter_model_type_small"),
        "asserts LoRA's own class names",
        "tests/tuners/test_registration.py::test_mappings",
    ),
    Deselected(
        ("test_peft_types_small", "test_model_status_with_modules_to_save", "test_model_status_with_trainable_tokens"),
        "asserts LoRA's own method name",
        "tests/tuners/test_registration.py::test_lookup",
    ),
    Deselected(
        ("test_nb_params_small", "test_prefixes_select_correct_state_dict_keys"),
        "counts or lists LoRA's two factors; kept starts are saved too",
        "tests/tuners/test_loading.py::test_every_way_of_loading_gives_the_same_bits_without_a_decomposition",
    ),
    Deselected(
        ("test_inject_from_state_dict_missing_keys_warning",),
        "deletes LoRA's two factors of a layer from a state dict and leaves the starts; a partial layer is refused",
        "tests/tuners/test_loading.py::test_one_missing_tensor_is_refused",
    ),
    Deselected(
        ("test_training*layer_indexing[sparse*]",),
        "layers_to_transform needs a list of targets, which would have to name another one for each architecture",
        "tests/tuners/test_sparse_loading.py::test_options_survive_the_folder",
    ),
    Deselected(
        ("test_rank_and_alpha_pattern_no_matching_keys",),
        "a pattern that matches no layer is refused, not ignored",
        REFUSALS + "test_a_name_that_matches_nothing",
    ),
    Deselected(
        (
            "TestExcludedModuleNames::test_no_modules_matched*",
            "test_second_adapter_only_modules_to_save_raises",
            "test_some_modules_excluded_some_unmatched",
        ),
        "asserts PEFT's wording; a target that matches nothing is refused earlier, by name",
        REFUSALS + "test_a_name_that_matches_nothing",
    ),
    Deselected(
        ("test_fixed_rank_lora_config", "test_converted_lora_to_lora_works_and_warns"),
        "asserts what convert_to_lora does for LoRA itself; its result is a LoraConfig, which ours is not",
        SURFACE,
    ),
    Deselected(
        ("test_save_pretrained_warns_for_unsharded_state_dict",),
        "PEFT recognises shards of LoRA alone; sharded bases are refused",
        REFUSALS + "test_a_weight_without_values",
    ),
    Deselected(
        ("test_base_model_module_named_like_peft_prefix[Sparse]",),
        "the test looks up LoRA's and LoKr's prefixes in a table of its own",
        "tests/tuners/test_sparse_config.py::test_every_trainable_name_has_the_prefix_and_the_adapter_in_its_middle",
    ),
    Deselected(
        (
            "test_training*layer_indexing[projected*]",
            "test_training*layer_indexing[pissa*]",
            "test_training*gradient_checkpointing[*-projected-*]",
            "test_training*gradient_checkpointing[*-pissa-*]",
        ),
        "asserts a gradient for every tensor of the adapter; starts and bases are frozen (with LoRA's start they run)",
        "tests/tuners/test_running.py::test_gradient_checkpointing_gives_the_same_gradients",
    ),
    Deselected(
        ("test_generate_with_mixed_adapter_batches[projected*]", "test_generate_with_mixed_adapter_batches[pissa*]"),
        "multiplies every tensor of the adapter by ten, bases and starts too",
        "tests/tuners/test_several_adapters.py::test_a_mixed_batch_equals_each_adapter_alone",
    ),
    Deselected(
        ("test_merge_layers_multi[sparse-*]",),
        "merges two sparse adapters of one layer, which is refused",
        "tests/tuners/test_sparse_lifecycle.py::test_two_adapters_cannot_be_merged",
    ),
    Deselected(
        (
            "test_training_prompt_learning_tasks",
            "test_prompt_tuning_text_prepare_for_training",
            "test_prompt_tuning_sample_vocab_prepare_for_training",
            "test_set_requires_grad_prompt_learning_raises",
            "TestPeftFeatureExtractionModel::test_passing_input_embeds_works",
        ),
        "is for prompt learning, and skips every other method",
        SURFACE,
    ),
    # -- what needs the hub or packages that are not here ---------------------------------------------------------
    Deselected(
        (
            "test_inject_from_state_dict_stable_diffusion",
            "test_maybe_include_all_linear_layers_diffusion",
            "test_inject_from_state_dict_low_cpu_mem_usage_with_weight_conversion",
            "test_inject_from_state_dict_model_with_weight_conversion",
            "test_prefix_removal_is_undone",
            "test_base_model_type_transformers_automodel",
            "test_override_lora_linear",
            "test_delete_adapter_multiple_adapters_with_trainable_token_indices",
            "test_multiple_adapters_automatic_modules_to_save",
            "test_multiple_adapters_no_needless_copy_modules_to_save",
        ),
        "needs a trained model of the hub, or diffusers",
        SURFACE,
    ),
)


SKIPPED: tuple[Skipped, ...] = (
    Skipped(
        ("test_mixed_adapter_batches_lora_opt_timing",),
        "requires a hardware accelerator",
        "times a GPU",
        "tests/tuners/test_several_adapters.py::test_a_mixed_batch_equals_each_adapter_alone",
    ),
    Skipped(
        ("test_disable_adapter_with_bias_warns",),
        "only for LoraConfig or BOFTConfig",
        "trained biases are refused (PEFT's condition skips LoRA too)",
        OPTIONS,
    ),
    Skipped(
        (
            "test_active_adapter[*modules_to_save*]",
            "test_active_adapter[*Vanilla MLP 5 LoRA*]",
            "test_active_adapter[*trainable_tokens*]",
        ),
        "Multiple active adapters with modules_to_save",
        "PEFT allows one active adapter for a module to save",
        "tests/tuners/test_several_adapters.py::test_switching_changes_the_output_and_both_together_add_up",
    ),
    Skipped(
        (
            "test_adding_multiple_adapters_with_bias_raises[*Sparse*]",
            "test_adding_multiple_adapters_with_bias_raises[sparse*]",
        ),
        "does not support the 'bias' argument",
        "the sparse config has no bias option",
        "tests/tuners/test_sparse_config.py::test_defaults",
    ),
    Skipped(
        ("test_save_load_roundtrip_fsdp_wrapped_learnable_bias[*Sparse*]",),
        "support training the bias directly",
        "the sparse config has no bias option",
        "tests/tuners/test_sparse_config.py::test_defaults",
    ),
    Skipped(
        ("test_weighted_combination_of_adapters[sparse*]",),
        "Test not applicable",
        "PEFT's test knows LoRA and IA3 alone; sparse updates are summed on the union of their masks",
        "tests/tuners/test_sparse_weighted.py::test_every_structure_and_orientation",
    ),
    Skipped(
        ("test_mixed_adapter_batches[sparse*]", "test_generate_with_mixed_adapter_batches[sparse*]"),
        "Mixed adapter batches not supported",
        "PEFT's test knows LoRA's layers alone; sparse adapters can be mixed",
        "tests/tuners/test_mixed_batches.py::test_each_sample_as_with_its_own_adapter",
    ),
    Skipped(
        ("test_prepare_for_training_parametrized[tokens*]",),
        "Trainable tokens is incompatible",
        "PEFT skips it for LoRA too: trained tokens make the embeddings' output require a gradient",
        SURFACE,
    ),
    Skipped(
        ("test_generate_with_mixed_adapter_batches[tokens*]", "test_merge_layers_multi[tokens*]"),
        "[Tt]rainable token",
        "PEFT skips it for LoRA too: equal tokens of two adapters cannot be told apart or merged",
        "tests/tuners/test_several_adapters.py::test_a_mixed_batch_equals_each_adapter_alone",
    ),
)

# PEFT's LoRA cases that off-principal LoRA refuses (cases.REFUSED), and which test of ours sees that refused.
REFUSED_LORA_CASES: dict[str, str] = {
    "*DoRA*": OPTIONS,
    "*KaSA*": OPTIONS,
    "*MiCA*": OPTIONS,
    "*VeLoRA*": OPTIONS,
    "*Monteclora*": OPTIONS,
    "*BD-LoRA*": OPTIONS,
    "*lora_b bias*": OPTIONS,
    "*nn.Parameter*": OPTIONS,
    "*alora*": OPTIONS,
    "Embedding + transformers Conv1D [23] LoRA": CLASSES,
    "Conv[123]d*LoRA": CLASSES,
    "MHA*": CLASSES,
}
