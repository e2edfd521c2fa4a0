"""Twenty questions in HellaSwag's format, written for the tests: they are in no benchmark."""

import json
from pathlib import Path

# context, the right ending, three wrong ones
_TEXTS = [
    (
        "A woman stands at a kitchen counter with a bowl of flour. She cracks two eggs into the bowl. She",
        "stirs the eggs into the flour with a wooden spoon.",
        "parks the bowl beside a row of taxis.",
        "sings the eggs to sleep and closes the window of the train.",
        "paints the counter blue before the race begins.",
    ),
    (
        "A boy is sitting on a swing in a park. His father pushes him from behind. The swing",
        "goes higher and higher while the boy laughs.",
        "is folded twice and put into an envelope.",
        "boils over and has to be taken off the stove.",
        "reads the last page and asks for a glass of juice.",
    ),
    (
        "[header] How to sharpen a pencil [title] Choose a sharpener. [step] Pick one whose hole fits your pencil.",
        "Push the pencil in and turn it until the tip is sharp.",
        "Water the sharpener every morning and keep it out of the wind.",
        "Ask the pencil to wait outside until you have finished your soup.",
        "Melt the hole in a small pan and let it cool.",
    ),
    (
        "Two men carry a long ladder across the yard and lean it against the wall of the house. One of them",
        "climbs up while the other holds the ladder steady.",
        "swims under the ladder to the far side of the lake.",
        "pours the ladder into four cups and serves them with sugar.",
        "shuffles the wall and deals five bricks to everyone.",
    ),
    (
        "A cat is lying on a sunny window sill. A bird lands on the branch outside. The cat",
        "lifts its head and watches the bird through the glass.",
        "signs the contract and shakes hands with the branch.",
        "changes the tyre and drives on towards the coast.",
        "adds a pinch of salt to the window.",
    ),
    (
        "The runners line up at the start of the track. The starter raises his arm. At the shot the runners",
        "sprint down their lanes towards the first bend.",
        "lie down on the piano and count the keys.",
        "fry the track on both sides until it is golden.",
        "return their library books one by one.",
    ),
    (
        "A man kneels beside a bicycle that stands upside down. He takes off the wheel and pulls out the tube. He",
        "patches the hole and pumps the tube up again.",
        "sows the wheel in rows and covers it with soil.",
        "lets the tube sing the second verse.",
        "weighs the bicycle and wraps it in paper for the customer with the dog.",
    ),
    (
        "[header] How to plant a tulip [title] Dig a hole. [step] Make it three times as deep as the bulb is high.",
        "Set the bulb in with its tip up and fill the hole with earth.",
        "Iron the bulb at a low heat and hang it in the wardrobe.",
        "Dial the number of the hole and leave a message.",
        "Throw the bulb at the goal before the whistle blows.",
    ),
    (
        "A girl opens her violin case and takes out the bow. She tightens it and rubs it with rosin. Then she",
        "rests the violin under her chin and begins to play.",
        "cuts the violin into slices and toasts them.",
        "rows the case to the middle of the pond.",
        "asks the rosin for directions to the airport, but it is closed on Mondays.",
    ),
    (
        "Snow has fallen during the night. A man comes out of his front door with a shovel. He",
        "clears the path from the door to the street.",
        "knits the shovel a pair of red socks.",
        "spreads the door with butter and honey.",
        "puts the night back on the shelf.",
    ),
    (
        "A barber puts a cape around a customer and combs his wet hair. The barber",
        "starts to cut the hair with scissors.",
        "saddles the customer and rides to the next village.",
        "photographs the soup from all sides.",
        "unscrews the comb and replaces its batteries with olives.",
    ),
    (
        "Children are building a castle of sand on the beach. A big wave rolls in. The castle",
        "collapses and the children shriek with delight.",
        "passes its driving test at the second attempt.",
        "orders a coffee and the bill.",
        "barks at the postman until he drops the letters.",
    ),
    (
        "[header] How to wash a woollen sweater [title] Fill a basin. [step] Use lukewarm water and a mild soap.",
        "Press the sweater gently in the water and do not wring it.",
        "Bake the sweater for forty minutes and test it with a fork.",
        "Inflate the basin until it floats above the trees.",
        "Move the sweater diagonally, as you would a bishop.",
    ),
    (
        "A goalkeeper stands between the posts. A player runs up and kicks the ball hard to the left. The goalkeeper",
        "dives to the left and pushes the ball away.",
        "grates the ball over a plate of noodles.",
        "marks the page and switches off the lamp.",
        "sells the posts a ticket to the opera and keeps the change for the whole of the winter.",
    ),
    (
        "An old man sets up a chessboard in the square. A student sits down across from him. They",
        "shake hands and the student moves a pawn.",
        "tie the square to the mast and hoist it.",
        "milk the chessboard twice a day.",
        "peel the bishops and soak them overnight.",
    ),
    (
        "A woman threads a needle and takes a shirt from the basket. A button is missing. She",
        "sews a new button on the shirt.",
        "launches the basket into a low orbit.",
        "plants the needle beside the road and waits for rain.",
        "tunes the shirt a little higher.",
    ),
    (
        "The lights in the cinema go out and the curtain opens. A couple share a bag of popcorn. On the screen",
        "the title of the film appears.",
        "a sandwich is buttered by the wind.",
        "the popcorn signs in with a new password.",
        "the back row is sanded down and varnished twice.",
    ),
    (
        "[header] How to make tea [title] Boil some water. [step] Warm the pot and put in one spoon of leaves a cup.",
        "Pour the water over the leaves and wait four minutes.",
        "Sweep the leaves under the carpet before the guests see the ceiling.",
        "Comb the pot from left to right.",
        "Fasten the cup to your ankle and jump.",
    ),
    (
        "A fisherman casts his line from the pier. After a long wait the float dips under the water. He",
        "reels in the line and finds a small fish on the hook.",
        "paints the wait in three shades of green.",
        "staples the water to the back of the form.",
        "dictates the pier a letter to his aunt in the mountains.",
    ),
    (
        "A dog waits at the door with a lead in its mouth. Its owner puts on a coat and boots. They",
        "go out together for a walk.",
        "divide the door by seven and carry the two.",
        "fold the coat into a boat and sail it down the gutter as far as the bakery.",
        "tune in to the boots at noon.",
    ),
]


def _question(number: int, context: str, right: str, *wrong: str) -> dict:
    label = number * 7 % 4  # every label five times
    endings = [*wrong[:label], right, *wrong[label:]]
    return {"ind": number, "ctx": context, "endings": endings, "label": label, "split": "val", "source_id": "own"}


QUESTIONS = [_question(number, *texts) for number, texts in enumerate(_TEXTS)]


def write_questions(path: Path, questions: list[dict] = QUESTIONS) -> Path:
    """Writes a file of questions, a JSON object a line. Return its path."""
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return path
