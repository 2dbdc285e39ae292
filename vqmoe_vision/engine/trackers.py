"""Where the numbers of a run go besides the backends of mmengine."""

from typing import Any

from mmengine.config import Config
from mmengine.registry import VISBACKENDS
from mmengine.visualization.vis_backend import BaseVisBackend, force_init_env


@VISBACKENDS.register_module()
class TrackioVisBackend(BaseVisBackend):
    """Logs to trackio, which keeps a file of SQLite on this machine unless it is told otherwise.

    Args:
        save_dir: That of all backends; trackio's own is TRACKIO_DIR.
        init_kwargs: Of `trackio.init`; the project is 'vqmoe_vision' unless it is named.
    """

    def __init__(self, save_dir: str, init_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(save_dir)
        self._given = {'project': 'vqmoe_vision', **(init_kwargs or {})}

    def _init_env(self) -> None:
        import trackio

        self._trackio, self._run = trackio, trackio.init(**self._given)

    @property
    @force_init_env
    def experiment(self) -> Any:
        """The run of trackio."""
        return self._run

    def add_config(self, config: Config, **_: Any) -> None:
        """Keeps the config for the first numbers, with which trackio writes it."""
        self.experiment.config.update(config.to_dict())

    def add_scalar(self, name: str, value: Any, step: int = 0, **_: Any) -> None:
        """Logs a number."""
        self.add_scalars({name: value}, step)

    def add_scalars(self, scalar_dict: dict, step: int = 0, *_: Any, **__: Any) -> None:
        """Logs numbers; `time` is a word of trackio's own."""
        named = {f'{n}_per_iter' if n == 'time' else n: float(v) for n, v in scalar_dict.items()}
        self.experiment.log(named, step=step)

    def add_image(self, name: str, image: Any, step: int = 0, **_: Any) -> None:
        """Logs an image, (H, W, 3) uint8 in RGB."""
        self.experiment.log({name: self._trackio.Image(image)}, step=step)

    def close(self) -> None:
        """Writes what is left."""
        if self._env_initialized:
            self._trackio.finish()
