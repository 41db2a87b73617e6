# Settings of different experiments.
OVERRIDES = [
    dict(base_lr=1e-4),
    dict(base_lr=1e-5),
    dict(seed=1),
    dict(t_min=0.01),
    dict(time_mean=-1.5),
    dict(time_mean=1.5),
    dict(stratified=False),
    dict(dequantize=True),
    dict(channel_mults=(1, 2, 3)),
    dict(channel_mults=(12, 3)),
    dict(attention_resolutions=(4,)),
    dict(model_type='x0', target_type='score'),
    dict(num_training_steps=2000),
    dict(init_from='ckpts/a/last.pt'),
    dict(init_from='ckpts/' + 200 * 'a' + 'b/last.pt'),
    dict(init_from='ckpts/' + 200 * 'a' + 'c/last.pt'),
]
