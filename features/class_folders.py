"""Folders of images as torchvision reads them. The module is imported where it is used, because that takes seconds."""

from torchvision.datasets import ImageFolder

from features.images import is_hidden


class ClassFolders(ImageFolder):
    """An ImageFolder without the folders that are hidden or belong to the system, which are not classes."""

    def find_classes(self, directory) -> tuple[list[str], dict[str, int]]:
        classes = [name for name in super().find_classes(directory)[0] if not is_hidden(name)]
        if not classes:
            raise FileNotFoundError(f"{directory} holds no classes")
        return classes, {name: label for label, name in enumerate(classes)}
