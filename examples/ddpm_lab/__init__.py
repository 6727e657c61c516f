"""The parts of `examples/ddpm.py`, a driver that fine-tunes MONAI's 3D diffusion U-Net.

Each imports only what stands to its left:

    faults <- config <- reading, outliers <- manifest <- files <- locks, volumes, population <- base_file <- unet,
           diffusion <- method <- training, sampling <- encoder, bootstrap, metrics <- distances <- slices <- plots,
           summary <- finetune <- estimate <- demo, prepare
    sampling, training <- variants, grid, sample_sets <- sample
    distances <- real_volumes <- evaluate
    study_config <- study_check, cost, dry_run, study_run <- study_data <- study
           study_run <- study_results <- study_tables, study_plots <- page <- report
"""
