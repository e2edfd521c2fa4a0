"""`python -m training.ladder`: see climb.py."""

from training.ladder.climb import main

if __name__ == "__main__":
    main()
