"""The other tools of the suite peers: torchreid (deep-person-reid), fast-reid and BoxMOT's ReID trainer.

Each trains, embeds and evaluates by its own code, by the same recipe as far as its settings go: flips and small shifts,
P x K batches, cross-entropy with label smoothing, batch hard triplets with a margin, Adam at a constant rate, stride 2
in the last stage, everything in one process. Q queries, G gallery, D width.
"""

import collections
import collections.abc
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Ids = Sequence[Any]  # arrays: persons (Q,) and (G,), cameras (Q,) and (G,)
Features = tuple[Any, Any, Ids]  # arrays (Q, D) and (G, D)
Evaluator = Callable[[Any, Any, Ids], float]  # of features and ids to the mAP
HEIGHT, WIDTH, BATCH, INSTANCES = 128, 64, 64, 4
RATE, DECAY, MARGIN, SMOOTHING = 3.5e-4, 5e-4, 0.3, 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METRIC = {"ours": "euclidean", "torchreid": "euclidean", "fast-reid": "cosine", "boxmot": "cosine"}  # by default


class Tool(ABC):
    """What is asked of every tool, in its own ways."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def train(self) -> None:
        """Train without an end."""

    @abstractmethod
    def embed(self) -> Features:
        """Embed query and gallery from their files by the model as trained so far."""

    @staticmethod
    @abstractmethod
    def evaluator(*, exact: bool) -> Evaluator:
        """Return the tool's mAP by the metric that it has by default; exact: of fp64 features, and summed in fp64."""


class Torchreid(Tool):
    """The engine for cross-entropy and triplets, as its README begins one."""

    engine: Any

    def train(self) -> None:
        import torchreid

        loaded = torchreid.data.ImageDataManager(
            root=str(Path(self.job["data"]).parent), sources="market1501", height=HEIGHT, width=WIDTH, workers=0,
            use_gpu=False, transforms=["random_flip", "random_crop"], batch_size_train=BATCH, batch_size_test=BATCH,
            num_instances=INSTANCES, train_sampler="RandomIdentitySampler",
        )  # fmt: skip
        model = torchreid.models.build_model(
            self.job["backbone"], loaded.num_train_pids, loss="triplet", pretrained=False, use_gpu=False
        )
        torchreid.utils.load_pretrained_weights(model, self.job["weights"])
        optimizer = torchreid.optim.build_optimizer(model, optim="adam", lr=RATE, weight_decay=DECAY, adam_beta2=0.999)
        self.engine = torchreid.engine.ImageTripletEngine(loaded, model, optimizer, margin=MARGIN, use_gpu=False)
        self.engine.run(save_dir=self.job["folder"], max_epoch=1000)

    def embed(self) -> Features:
        import numpy as np
        import torch

        self.engine.set_model_mode("eval")
        features, persons, cameras = [], [], []
        with torch.no_grad():
            for loader in self.engine.test_loader["market1501"].values():  # query, gallery
                batches = [self.engine.parse_data_for_eval(data) for data in loader]
                features.append(torch.cat([self.engine.extract_features(images) for images, _, _ in batches]).numpy())
                persons.append(np.concatenate([ids.numpy() for _, ids, _ in batches]))
                cameras.append(np.concatenate([ids.numpy() for _, _, ids in batches]))
        return features[0], features[1], (*persons, *cameras)

    @staticmethod
    def evaluator(*, exact: bool) -> Evaluator:
        from torch import from_numpy
        from torchreid import metrics

        def evaluate(query: Any, gallery: Any, ids: Ids) -> float:
            distances = metrics.compute_distance_matrix(from_numpy(query), from_numpy(gallery)).numpy()
            return float(metrics.evaluate_rank(distances, *ids, use_cython=not exact)[1])

        return evaluate


class FastReID(Tool):
    """The default trainer on the strong baseline's configuration.

    Two things keep it from a current Python and from a CPU, and are replaced: `collections.Mapping`, which was
    renamed, and its data loader, which copies batches on a CUDA stream.
    """

    cfg: Any
    trainer: Any

    def train(self) -> None:
        _restore_names()
        job = self.job
        os.environ["FASTREID_DATASETS"] = job["data"]
        from fastreid.config import get_cfg
        from fastreid.data import build
        from fastreid.engine import DefaultTrainer
        from torch.utils.data import DataLoader

        build.DataLoaderX = lambda _, **options: DataLoader(**options)
        self.cfg = get_cfg()
        self.cfg.merge_from_file(str(Path(job["source"]) / "configs/Market1501/bagtricks_R50.yml"))
        self.cfg.merge_from_list([
            "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.DEPTH", f"{job['backbone'].removeprefix('resnet')}x",
            "MODEL.BACKBONE.FEAT_DIM", 2048 if job["backbone"] == "resnet50" else 512,
            "MODEL.BACKBONE.LAST_STRIDE", 2, "MODEL.BACKBONE.PRETRAIN_PATH", job["weights"],
            "INPUT.SIZE_TRAIN", [HEIGHT, WIDTH], "INPUT.SIZE_TEST", [HEIGHT, WIDTH], "INPUT.REA.ENABLED", False,
            "INPUT.PADDING.SIZE", 5, "DATALOADER.NUM_WORKERS", 0, "SOLVER.AMP.ENABLED", False,
            "SOLVER.IMS_PER_BATCH", BATCH, "SOLVER.BASE_LR", RATE, "SOLVER.WARMUP_ITERS", 0,
            "SOLVER.MAX_EPOCH", 1000, "SOLVER.STEPS", [1000], "SOLVER.CHECKPOINT_PERIOD", 2000,
            "TEST.EVAL_PERIOD", 2000, "TEST.IMS_PER_BATCH", BATCH, "OUTPUT_DIR", job["folder"],
        ])  # fmt: skip
        self.trainer = DefaultTrainer(self.cfg)
        self.trainer.train()

    def embed(self) -> Features:
        import torch
        from fastreid.data import build_reid_test_loader
        from fastreid.evaluation import ReidEvaluator, inference_on_dataset

        loader, count = build_reid_test_loader(self.cfg, dataset_name="Market1501", num_workers=0)

        class Kept(ReidEvaluator):
            def evaluate(self) -> dict[str, float]:
                return {}

        kept = Kept(self.cfg, count)
        inference_on_dataset(self.trainer.model, loader, kept)
        features, persons, cameras = (
            torch.cat([batch[what] for batch in kept._predictions]).numpy() for what in ("feats", "pids", "camids")
        )
        return features[:count], features[count:], (persons[:count], persons[count:], cameras[:count], cameras[count:])

    @staticmethod
    def evaluator(*, exact: bool) -> Evaluator:
        _restore_names()
        import numpy as np
        from fastreid.evaluation.rank import evaluate_rank
        from fastreid.utils.compute_dist import build_dist
        from torch import from_numpy

        def evaluate(query: Any, gallery: Any, ids: Ids) -> float:
            distances = build_dist(from_numpy(query), from_numpy(gallery), METRIC["fast-reid"])
            return float(np.mean(evaluate_rank(distances, *ids, use_cython=not exact)[1]))

        return evaluate


def _restore_names() -> None:
    collections.Mapping = collections.abc.Mapping  # type: ignore[attr-defined]


class BoxMOT(Tool):
    """The ReID trainer; it takes no file of weights for a ResNet, so they are loaded into the model that it builds."""

    model: Any
    loaders: Any

    def train(self) -> None:
        import torch
        from boxmot.reid.training.trainer import ReIDTrainer

        tool, weights = self, self.job["weights"]

        class Kept(ReIDTrainer):
            def _build_model(self, num_classes: int) -> Any:
                tool.model = super()._build_model(num_classes)
                tool.model.load_state_dict(torch.load(weights), strict=False)
                return tool.model

            def _build_loader_bundle(self, data: Any) -> Any:
                tool.loaders = super()._build_loader_bundle(data)
                return tool.loaders

        trainer = Kept(
            self.job["backbone"], "market1501", self.job["data"], loss_type="triplet", img_size=(HEIGHT, WIDTH),
            batch_size=BATCH, lr=RATE, weight_decay=DECAY, epochs=1000, warmup_epochs=0, eval_interval=1000,
            p=BATCH // INSTANCES, k=INSTANCES, margin=MARGIN, label_smooth=SMOOTHING, triplet_soft_margin=False,
            center_loss_weight=0, pretrained=False, device="cpu", project=self.job["folder"], num_workers=0,
            random_erasing=0, random_patch=False, color_augmentation=False,
        )  # fmt: skip
        trainer.run()

    def embed(self) -> Features:
        import torch
        from boxmot.reid.training.evaluator import extract_features

        parts = [extract_features(self.model, loader, torch.device("cpu"))
                 for loader in (self.loaders.query, self.loaders.gallery)]  # fmt: skip
        (query, query_persons, query_cameras), (gallery, persons, cameras) = parts
        return query, gallery, (query_persons, persons, query_cameras, cameras)

    @staticmethod
    def evaluator(*, exact: bool) -> Evaluator:
        from boxmot.reid.training.evaluator import compute_distance_matrix, evaluate_ranking
        from numpy.linalg import norm

        def evaluate(query: Any, gallery: Any, ids: Ids) -> float:
            if exact:  # its function of the distances rounds to fp32, as the unit length of its features is
                query, gallery = (x / norm(x, axis=1, keepdims=True) for x in (query, gallery))
                return float(evaluate_ranking(1.0 - query @ gallery.T, *ids)[1])
            return float(evaluate_ranking(compute_distance_matrix(query, gallery), *ids)[1])

        return evaluate
