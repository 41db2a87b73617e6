"""Numbers in each cell of the table of examples/README.md, which examples.py writes, and the claims it checks."""

OWN_COMMAND = {'flow_map_table'}  # takes hours
# Flags for examples whose default takes too long here.
FLAGS: dict[str, str] = {}
# example -> wording -> names of numbers, without `final/`; * stands for anything. Others: all numbers that it prints.
W, LABELS, F, LABELS_AND_F = 'W in {} steps', 'agreement', 'F', dict(agreement='*/label_agreement', F='*/frechet')
CELLS: dict[str, dict[str, str]] = {
    'bridge': {
        'cost': 'down/cost_down', 'least possible, without noise': 'up/least',
        'W at the moons': 'down/wasserstein_x0', 'W at the Gaussians': 'up/wasserstein_x1',
    },
    'condition': {'error in standard deviations: ink': '*/ink_error', 'slant': '*/slant_error'},
    'consistency': {W.format('1, 2'): 'steps_1/wasserstein steps_2/wasserstein', 'real points': 'steps_1/real_w*'},
    'contrastive': {LABELS: 'adams/label_agreement', F: 'adams/frechet'},
    'dispersive': {LABELS: 'adams/label_agreement', F: 'adams/frechet'},
    'distill': {W.format('1, 20'): 'steps_1/wasserstein steps_20/wasserstein', 'recall': '*/recall'},
    'drifting': {W.format(1): 'steps_1/wasserstein', 'real points': 'steps_1/real_wasserstein'},
    'edm': {'difference from table 1': 'eval/difference_from_table_1', F: '*/frechet'},
    'few_step_likelihood': {
        'error of log p in nats, in 1, 2, 4, 8, 32 steps': ' '.join(f'steps_1/error_{n}' for n in (1, 2, 4, 8, 32)),
        'its mean over held-out points': ' '.join(f'steps_1/nats_{n}' for n in (1, 2, 4, 8, 32)),
        'exact': 'steps_1/nats_exact', W.format('1'): 'steps_1/wasserstein',
    },
    'field': {
        'error of the spectrum': 'samples/spectrum_error', 'of exact draws': 'samples/real_spectrum_error',
        'squared jump across the border': 'samples/seam', 'reference loss': 'eval/reference', 'least': 'samples/least',
    },
    'flow_map': {W.format('1, 2, 4, 20'): ' '.join(f'steps_{n}/wasserstein' for n in (1, 2, 4, 20))},
    'flow_map_distill': {W.format('1, 2, 4, 20'): ' '.join(f'steps_{n}/wasserstein' for n in (1, 2, 4, 20))},
    'forecast': {
        'CRPS of the next state': '*/crps_1', 'exact': 'adams/exact_crps_1', 'spread over skill': '*/spread_skill_1',
        'error of the spectrum': '*/spectrum_error_1', 'of exact draws': 'adams/real_spectrum_error_1',
        'CRPS after four forecasts': '*/crps_4', 'exact there': 'adams/exact_crps_4',
    },
    'guidance': LABELS_AND_F,
    'image_to_image': {'error': '*/rmse', F: '*/frechet'},
    'interpolant': {
        'W at the moons': 'down_*/wasserstein_x0', 'real points': 'down_0/real_wasserstein_x0',
        'W at the Gaussians': 'up_*/wasserstein_x1', 'real points there': 'up_0/real_wasserstein_x1',
    },
    'inverse': {'W from the exact posterior': '*/wasserstein', 'other exact draws': 'none/real_wasserstein'},
    'latent': LABELS_AND_F | {'images a second': 'train/images_per_second', 'F of real pictures': 'adams/real_frechet'},
    'masked': {'bits a pixel': 'eval/bits*'} | LABELS_AND_F,
    'multimarginal': {
        'W at the held-out time': '*_half/wasserstein_half', 'linear interpolation': 'edges_half/linear_half',
        'W at the first time': '*_0/wasserstein_0', 'real points': 'edges_half/real_wasserstein_half',
    },
    'nets': {
        'effective sample size': 'adams/ess_ais_0.01 adams/ess_nets_0.01',
        'log Z': 'adams/log_z_ais_0.01 adams/log_z_nets_0.01 adams/real_log_z',
    },
    'ot_coupling': {
        W.format('1, 2, 4, 40'): ' '.join(f'euler_{n}/wasserstein' for n in (1, 2, 4, 40)),
        'error of the condition in 40': 'euler_40/condition_error', 'real points': 'euler_1/real_wasserstein',
    },
    'reflow': {'straightness': '*/straightness', W.format('1, 2'): 'euler_1/wasserstein euler_2/wasserstein'},
    'x_prediction': {F: '*/frechet'},
}  # fmt: skip
CLAIMS = {  # example -> its claim, about two numbers of runs
    'bridge': 'bridge down/cost_down < plain down/cost_down',
    'condition': 'told guidance_1/ink_error < plain guidance_1/ink_error',
    'consistency': 'training steps_2/wasserstein < plain steps_2/wasserstein',
    'contrastive': 'contrastive adams/label_agreement > plain adams/label_agreement',
    'dispersive': 'dispersive adams/frechet < plain adams/frechet',
    'distill': 'student steps_1/wasserstein < teacher steps_1/wasserstein',
    'few_step_likelihood': 'map steps_1/error_4 < plain steps_1/error_4',
    'field': 'circular samples/spectrum_error < zeros samples/spectrum_error',
    'flow_map': 'lagrangian steps_1/wasserstein < plain steps_1/wasserstein',
    'flow_map_distill': 'lagrangian steps_1/wasserstein < self steps_1/wasserstein',
    'forecast': 'Forecast foellmer/crps_1 < Forecast learned/crps_1',
    'guidance': 'plain cfg/label_agreement > plain unguided/label_agreement',
    'image_to_image': 'from_degraded euler_20/rmse < from_noise euler_20/rmse',
    'inverse': 'unconditional mmps/wasserstein < unconditional none/wasserstein',
    'latent': 'latents train/images_per_second > pixels train/images_per_second',
    'multimarginal': 'optimal curved_half/wasserstein_half < optimal curved_half/linear_half',
    'nets': 'nets adams/ess_nets_0.01 > nets adams/ess_ais_0.01',
    'ot_coupling': 'c2ot euler_1/wasserstein < ot euler_1/wasserstein',
    'reflow': 'second euler_1/wasserstein < first euler_1/wasserstein',
}
