"""The names of the metrics. This module imports nothing: the command line needs the names before anything else."""

PAIRED = ("psnr", "ssim", "rel_l2", "lpips")
DISTRIBUTION = ("frechet", "sfid", "inception_score", "precision_recall")
