"""`python -m moe_zoo.data FOLDER` writes digit scenes."""
from .scenes import main

main()
