from training.ladder.climb import main

main()
