"""The parts of `examples/ddpm.py`, a driver that fine-tunes MONAI's 3D diffusion U-Net.

Each imports only what stands to its left:

    faults <- config <- manifest <- files <- volumes, population <- unet, diffusion <- training, sampling
           <- encoder, bootstrap, metrics <- distances <- plots, summary <- finetune <- demo, prepare
    sampling, training <- variants, grid, sample_sets <- sample
    distances <- real_volumes <- evaluate
    study_config <- cost, dry_run, study_run <- study_data <- study
           study_run <- study_results <- study_tables, study_plots <- page <- report
"""
