"""What other programs for training call the options that are here: people type those first."""

_THEIRS = {
    "model": "model_name model_name_or_path model_path base_model pretrained checkpoint", "data": "dataset dataset_path train_data train_file train_path",
    "eval_data": "validation_file val_data test_data eval_dataset", "eval_sequences": "max_eval_samples",
    "out": "output output_dir out_dir save_dir", "steps": "epochs num_epochs num_train_epochs max_steps num_steps iters iterations",
    "batch_size": "bs batch train_batch_size global_batch_size", "micro_batch": "per_device_train_batch_size micro_batch_size micro_batch_size_per_gpu",
    "seq_len": "max_length max_seq_length max_seq_len context_length sequence_length block_size cutoff_len",
    "lr": "learning_rate", "min_lr": "min_learning_rate", "schedule": "lr_scheduler lr_scheduler_type scheduler",
    "warmup_steps": "warmup num_warmup_steps", "max_grad_norm": "grad_clip gradient_clipping clip_grad clip", "weight_decay": "wd",
    "dtype": "bf16 fp16 fp32 precision torch_dtype half", "gpu_memory": "vram gpu_mem max_gpu_memory", "dram": "ram cpu_memory memory host_memory",
    "ssd": "nvme nvme_path offload_dir", "ssd_bandwidth": "bandwidth", "save_every": "save_steps save_interval", "eval_every": "eval_steps eval_interval",
    "keep": "save_total_limit", "log_every": "logging_steps log_interval", "attention": "attn_implementation attn flash_attention",
    "lora": "lora_rank lora_r r rank use_lora peft peft_config adapter lora_config", "lora_alpha": "alpha", "lora_dropout": "adapter_dropout",
    "lora_targets": "target_modules lora_target lora_target_modules", "lora_full": "modules_to_save", "lora_init": "init_lora_weights",
    "rslora": "use_rslora", "dora": "use_dora", "lora_layers": "layers_to_transform", "lora_tied": "ensure_weight_tying",
    "lora_exclude": "exclude_modules", "lora_parameters": "target_parameters", "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "deterministic": "full_determinism", "resume": "resume_from_checkpoint continue", "overwrite": "overwrite_output_dir force"}


def meant_by(name: str) -> str | None:
    """The option of another program's name."""
    return next((ours for ours, theirs in _THEIRS.items() if name.replace("-", "_").lower() in theirs.split()), None)
