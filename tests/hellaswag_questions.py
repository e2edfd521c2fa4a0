"""Twenty questions in HellaSwag's format, written for the tests: they are in no benchmark."""

import json
from pathlib import Path

# context, the right ending; the three wrong ones are the right ones of the next questions
_TEXTS = [
    (
        "A woman stands at a kitchen counter with a bowl of flour. She cracks two eggs into the bowl. She",
        "stirs the eggs into the flour with a wooden spoon.",
    ),
    (
        "A boy is sitting on a swing in a park. His father pushes him from behind. The swing",
        "goes higher and higher while the boy laughs.",
    ),
    (
        "[header] How to sharpen a pencil [title] Choose a sharpener. [step] Pick one whose hole fits your pencil.",
        "Push the pencil in and turn it until the tip is sharp.",
    ),
    (
        "Two men carry a long ladder across the yard and lean it against the wall of the house. One of them",
        "climbs up while the other holds the ladder steady.",
    ),
    (
        "A cat is lying on a sunny window sill. A bird lands on the branch outside. The cat",
        "lifts its head and watches the bird through the glass.",
    ),
    (
        "The runners line up at the start of the track. The starter raises his arm. At the shot the runners",
        "sprint down their lanes towards the first bend.",
    ),
    (
        "A man kneels beside a bicycle that stands upside down. He takes off the wheel and pulls out the tube. He",
        "patches the hole and pumps the tube up again.",
    ),
    (
        "[header] How to plant a tulip [title] Dig a hole. [step] Make it three times as deep as the bulb is high.",
        "Set the bulb in with its tip up and fill the hole with earth.",
    ),
    (
        "A girl opens her violin case and takes out the bow. She tightens it and rubs it with rosin. Then she",
        "rests the violin under her chin and begins to play.",
    ),
    (
        "Snow has fallen during the night. A man comes out of his front door with a shovel. He",
        "clears the path from the door to the street.",
    ),
    (
        "A barber puts a cape around a customer and combs his wet hair. The barber",
        "starts to cut the hair with scissors.",
    ),
    (
        "Children are building a castle of sand on the beach. A big wave rolls in. The castle",
        "collapses and the children shriek with delight.",
    ),
    (
        "[header] How to wash a woollen sweater [title] Fill a basin. [step] Use lukewarm water and a mild soap.",
        "Press the sweater gently in the water and do not wring it.",
    ),
    (
        "A goalkeeper stands between the posts. A player runs up and kicks the ball hard to the left. The goalkeeper",
        "dives to the left and pushes the ball away.",
    ),
    (
        "An old man sets up a chessboard in the square. A student sits down across from him. They",
        "shake hands and the student moves a pawn.",
    ),
    (
        "A woman threads a needle and takes a shirt from the basket. A button is missing. She",
        "sews a new button on the shirt.",
    ),
    (
        "The lights in the cinema go out and the curtain opens. A couple share a bag of popcorn. On the screen",
        "the title of the film appears.",
    ),
    (
        "[header] How to make tea [title] Boil some water. [step] Warm the pot and put in one spoon of leaves a cup.",
        "Pour the water over the leaves and wait four minutes.",
    ),
    (
        "A fisherman casts his line from the pier. After a long wait the float dips under the water. He",
        "reels in the line and finds a small fish on the hook.",
    ),
    (
        "A dog waits at the door with a lead in its mouth. Its owner puts on a coat and boots. They",
        "go out together for a walk.",
    ),
]


def _question(number: int, context: str, right: str) -> dict:
    label = number * 7 % 4  # every label five times
    wrong = [_TEXTS[(number + i) % len(_TEXTS)][1] for i in (1, 2, 3)]
    endings = [*wrong[:label], right, *wrong[label:]]
    return {"ind": number, "ctx": context, "endings": endings, "label": label, "split": "val", "source_id": "own"}


QUESTIONS = [_question(number, *texts) for number, texts in enumerate(_TEXTS)]


def write_questions(path: Path, questions: list[dict] = QUESTIONS) -> Path:
    """Writes a file of questions, a JSON object a line. Return its path."""
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return path
