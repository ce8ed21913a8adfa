"""Class-wise contrastive learning for laparoscopic video segmentation.

The names that most people need come from here, `from cwcl import positive_mask, recipe, cwcl_learner`; each is imported
from its own module when it is first asked for, so a loss costs no more than PyTorch."""
import importlib, warnings

__version__ = "0.1.0"

# fastai 2.8 calls torch.jit.script as it is imported, which PyTorch 2.14 deprecates: nothing that a reader could mend
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)

PUBLIC = { # Module to the names that come from it
    'core': 'InputError Recipe recipe method_recipe goals loss_weights set_seed default_device',
    'methods': 'Method register_method load_methods',
    'data.labels': 'CLASSES PHASES ClassSet class_set decode_mask present_classes',
    'data.synth': 'render_scene write_scenes',
    'data.cholec': 'frame_table read_phases audit',
    'data.splits': 'TEST_VIDEOS video_folds label_budget split_frames class_coverage',
    'data.augment': 'SegAugment TwoViews',
    'data.streams': 'TwoStreamDL cwcl_dls',
    'data.own': 'own_table own_split own_classes',
    'pairs': 'label_set_ids positive_mask pair_stats lonely_probability',
    'models.unet': 'UNetEncoder UNetDecoder UNet',
    'models.heads': 'MultiScaleProjectionHead MSPH ClassificationHead',
    'losses.contrastive': 'contrastive_loss deep_contrastive_loss dcl_loss',
    'losses.fast_contrast': 'contrast_sum',
    'losses.segmentation': 'generalized_dice_loss focal_loss segmentation_loss presence_loss',
    'losses.fused': 'segmentation_terms',
    'metrics': 'confusion_matrix class_iou class_dice mean_iou surface_dice',
    'infer': 'window_starts sliding_window predict_frames',
    'tasks': 'CWCLNet CWCLLoss',
    'multitask': 'cwcl_learner',
    'distrib': 'gather_with_grad GatheredLoss',
    'checkpoint': 'save_model load_model',
    'resume': 'ResumeCallback',
    'results': 'evaluate',
    'train': 'train_run',
    'stages': 'stages_run',
    'baselines.simclr': 'nt_xent_loss simclr_learner simclr_recipe',
    'baselines.byol': 'byol_loss byol_learner byol_recipe',
    'beyond.choose': 'cover_frames typical_frames frame_features unsure_frames own_choice',
    'beyond.bank': 'LabelBank BankContrast bank_term',
    'beyond.paste': 'paste_rare rare_classes',
    'beyond.positives': 'overlap_weights overlap_contrast region_vectors region_contrast',
    'beyond.masked': 'draw_hidden masked_loss masked_learner',
    'beyond.encoders': 'TimmEncoder start_from',
    'beyond.average': 'average_decay move_mean draw_recolor recolor',
    'beyond.teacher': 'allowed_classes teacher_masks teacher_loss absent_loss',
    'study.grid': 'Run grid run_all',
    'study.tables': 'table1 table2',
    'study.verdicts': 'verdicts',
    'study.figure3': 'figure3',
    'video': 'segment_video'}
_HOME = {name: module for module,names in PUBLIC.items() for name in names.split()}
__all__ = sorted(_HOME)

def __getattr__(name):
    if name not in _HOME: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)

def __dir__(): return sorted({*globals(), *_HOME})
