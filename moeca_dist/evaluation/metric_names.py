"""The names of the metrics. Imports nothing: the command line needs them before anything else."""

PAIRED = ("psnr", "ssim", "rel_l2", "lpips")
DISTRIBUTION = ("frechet", "sfid", "inception_score", "precision_recall")
