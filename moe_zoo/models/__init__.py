"""The models, one file a family. Importing this package registers every one of them with timm."""
