"""Twenty questions in HellaSwag's format, written for the tests: they are in no benchmark."""

import json
from pathlib import Path

# Context | right ending. The wrong endings of a question are the right ones of the next three.
_TEXTS = """\
A woman stands at a kitchen counter and cracks two eggs into a bowl. She | stirs them into the flour with a spoon.
A boy sits on a swing in a park. His father pushes him. The swing | goes higher and higher while the boy laughs.
[header] How to sharpen a pencil [title] Choose a sharpener. [step] Push the pencil in and | turn it until it is sharp.
Two men lean a long ladder against the wall of the house. One of them | climbs up while the other holds it steady.
A cat is lying on a sunny window sill. A bird lands on the branch outside. The cat | watches the bird.
The runners line up. The starter raises his arm. At the shot the runners | sprint down their lanes to the first bend.
A man takes off the wheel of a bicycle and pulls out the tube. He | patches the hole and pumps the tube up again.
[header] How to plant a tulip [title] Dig a hole. [step] Make it deep. | Set the bulb in and fill the hole with earth.
A girl takes a violin out of its case and rubs the bow with rosin. Then she | begins to play.
Snow has fallen during the night. A man comes out with a shovel. He | clears the path from the door to the street.
A barber puts a cape around a customer and combs his wet hair. The barber | starts to cut the hair with scissors.
Children are building a castle of sand. A big wave rolls in. The castle | collapses and the children shriek.
[header] How to wash a sweater [title] Fill a basin. [step] Use mild soap. | Press the sweater and do not wring it.
A player runs up and kicks the ball hard to the left. The goalkeeper | dives to the left and pushes the ball away.
An old man sets up a chessboard in the square. A student sits down across from him. They | shake hands.
A woman threads a needle and takes a shirt from the basket. A button is missing. She | sews on a new one.
The lights in the cinema go out and the curtain opens. On the screen | the title of the film appears in large letters.
[header] How to make tea [title] Boil some water. [step] Warm the pot. | Pour the water over the leaves and wait.
A fisherman casts his line. After a long wait the float dips. He | reels in the line and finds a small fish on the hook.
A dog waits at the door with a lead in its mouth. Its owner puts on a coat and boots. They | go out for a walk.
"""
_CONTEXTS, _ENDINGS = zip(*(line.split(" | ") for line in _TEXTS.splitlines()), strict=True)


def _question(number: int) -> dict:
    label = number * 7 % 4  # every label five times
    endings = [_ENDINGS[(number + i) % 20] for i in (1, 2, 3)]
    endings.insert(label, _ENDINGS[number])
    context = _CONTEXTS[number]
    return {"ind": number, "ctx": context, "endings": endings, "label": label, "split": "val", "source_id": "own"}


QUESTIONS = [_question(number) for number in range(20)]


def write_questions(path: Path, questions: list[dict] = QUESTIONS) -> Path:
    """Write a file of questions, one JSON object per line. Return its path."""
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return path
