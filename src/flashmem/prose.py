"""Readable English without end: the chronicle of a small river town, day after day, drawn by a seed.

Filler for documents in which facts are hidden. It is made of our own sentences, so that no book has to be shipped; no
digit stands in it, so that every number of a document is a fact. It needs neither model nor tokenizer.

A paragraph has a kind (weather, market, letters ...): one of its opening sentences and some of its others. `{slot}` in
a sentence is filled from `SLOTS`; two people and the date are the same throughout a paragraph.

python -m flashmem.prose 20000 --seed 1 > town.txt
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_COLD_MONTHS = ("November", "December", "January", "February", "March")
_DAYS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
    "twentieth", "twenty-first", "twenty-second", "twenty-third", "twenty-fourth", "twenty-fifth", "twenty-sixth",
    "twenty-seventh", "twenty-eighth",
)  # fmt: skip
_WOMEN = (
    "Agnes", "Alice", "Beatrice", "Clara", "Dorothy", "Edith", "Ellen", "Esther", "Hannah", "Harriet", "Ida", "Mabel",
    "Martha", "Ruth", "Susan",
)  # fmt: skip
_MEN = (
    "Albert", "Arthur", "Edmund", "Ernest", "Francis", "George", "Henry", "Hugh", "Joseph", "Martin", "Oliver",
    "Philip", "Robert", "Simon", "Walter",
)  # fmt: skip
_SURNAMES = (
    "Ashby", "Barlow", "Birch", "Carter", "Cobb", "Dale", "Dyer", "Fenn", "Garland", "Hale", "Hobbs", "Kemp", "Lister",
    "Marsh", "Neville", "Oakes", "Pender", "Quill", "Rudge", "Sawyer", "Thorne", "Underhill", "Vane", "Wicks", "Yarrow",
)  # fmt: skip


def paragraphs(seed: int | str = 0) -> Iterator[list[str]]:
    """Yield paragraphs as lists of sentences, for ever; the same for the same seed, and none twice.

    Time goes on from paragraph to paragraph; sentence patterns return only when all of their kind were used.
    """
    draw = random.Random(f"prose {seed}")
    day, month = draw.randrange(len(_DAYS)), draw.randrange(12)
    kinds = _Deck(draw, tuple(KINDS))
    openings = {kind: _Deck(draw, opening) for kind, (opening, _) in KINDS.items()}
    bodies = {kind: _Deck(draw, body) for kind, (_, body) in KINDS.items()}
    seen: set[str] = set()
    while True:
        (kind,) = kinds.deal(1)
        templates = [*openings[kind].deal(1), *bodies[kind].deal(draw.randint(3, 7))]
        sentences = _paragraph(draw, templates, day, month)
        if (text := " ".join(sentences)) not in seen:
            seen.add(text)
            day += draw.randint(0, 3)
            month, day = (month + day // len(_DAYS)) % 12, day % len(_DAYS)
            yield sentences


def sentences(seed: int | str = 0) -> Iterator[str]:
    """Yield sentences for ever, each with the space or line break that leads it."""
    for paragraph in paragraphs(seed):
        for index, sentence in enumerate(paragraph):
            yield (" " if index else "\n") + sentence


def text(num_characters: int, seed: int | str = 0) -> str:
    """Whole paragraphs, one a line, of at least so many characters in all. Raises ValueError for a negative number."""
    if num_characters < 0:
        raise ValueError(f"num_characters must not be negative, got {num_characters}")
    lines: list[str] = []
    stream, size = paragraphs(seed), 0
    while size < num_characters:
        lines.append(" ".join(next(stream)) + "\n")
        size += len(lines[-1])
    return "".join(lines)


class _Deck:
    """Cards dealt in random order; shuffled again when there are too few left."""

    def __init__(self, draw: random.Random, cards: Sequence[str]) -> None:
        self.draw, self.cards, self.left = draw, cards, list[str]()

    def deal(self, count: int) -> list[str]:
        if len(self.left) < count:
            self.left = self.draw.sample(self.cards, len(self.cards))
        dealt, self.left = self.left[:count], self.left[count:]
        return dealt


def _paragraph(draw: random.Random, templates: Sequence[str], day: int, month: int) -> list[str]:
    season = "cold_sky" if _MONTHS[month] in _COLD_MONTHS else "warm_sky"
    bound = _people(draw) | {"date": f"the {_DAYS[day]} of {_MONTHS[month]}", "sky": f"{{{season}}}"}
    made: list[str] = []
    for template in templates:
        for role in ("who", "other"):  # the full name where a person comes in
            known = any(bound[role] in sentence for sentence in made)
            bound[f"{role}_short"] = bound[role].split()[0] if known else bound[role]
        made.append(_sentence(draw, template, bound))
    return made


def _people(draw: random.Random) -> dict[str, str]:
    """Two people of this paragraph: names and pronouns."""
    made: dict[str, str] = {}
    surnames = draw.sample(_SURNAMES, 2)
    for role, surname in zip(("who", "other"), surnames, strict=True):
        woman = draw.random() < 0.5
        made[role] = f"{draw.choice(_WOMEN if woman else _MEN)} {surname}"
        made[f"{role}_he"], made[f"{role}_his"] = ("she", "her") if woman else ("he", "his")
        made[f"{role}_him"] = "her" if woman else "him"
    return made


def _sentence(draw: random.Random, template: str, bound: Mapping[str, str]) -> str:
    while _SLOT.search(template):
        template = _SLOT.sub(lambda match: bound.get(match[1]) or draw.choice(SLOTS[match[1]]), template)
    template = _ARTICLE.sub(r"\1n ", template)
    return template[0].upper() + template[1:]


def _list(words: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in " ".join(words.split()).split(","))


SLOTS: Mapping[str, tuple[str, ...]] = {
    "place": _list(
        "the lower bridge, the corn hall, the old quarry, the ferry stage, the mill pond, the church green, Tanner's "
        "Row, the fish steps, the north gate, the rope walk, the schoolyard, the upper weir, Candle Lane, the "
        "lime kilns, the timber yard, the water meadow, the post house, the market cross, the salt store, Hatter's "
        "Hill, the toll house, the willow walk, the brick field, the almshouses, the east wharf, the cooper's yard"
    ),
    "shop": _list(
        "the bakery, the chandler's, the saddler's, the ironmonger's, the draper's, the apothecary's, the "
        "bookbinder's, the smithy, the glazier's, the cobbler's, the grocer's, the clockmaker's, the printing house, "
        "the potter's, the basket maker's, the dye works"
    ),
    "trade": _list(
        "baker, carter, cooper, ferryman, glazier, miller, printer, roper, saddler, schoolmaster, tanner, weaver, "
        "wheelwright, chandler, mason, tailor, thatcher, clockmaker, gardener, bookbinder, carpenter, postman"
    ),
    "people": _list(
        "the bargemen, the apprentices, the farmers, the schoolchildren, the widows of Candle Lane, the quarrymen, "
        "the washerwomen, the stall holders, the choir, the carters, the older boys, the hop pickers, the lodgers, "
        "the night watch, the reapers, the visitors, the millhands, the neighbours"
    ),
    "animal": _list(
        "a grey goose, a lame pony, a brindled dog, a flock of starlings, an old heron, a stray heifer, a white cat, "
        "a pair of swans, a tame jackdaw, a brown hare, a nanny goat, a barn owl, a young fox, a swarm of bees, a "
        "spotted pig, a pair of oxen"
    ),
    "goods": _list(
        "barley, candles, cheese, copper pans, dried pears, earthenware, flax, hemp rope, honey, lamp oil, leather, "
        "linen, nails, oak planks, onions, paper, pepper, roofing slate, salted herring, seed potatoes, soap, "
        "tea, tin plate, walnuts, window glass, wool, writing ink, yellow clay"
    ),
    "food": _list(
        "barley soup, cold mutton, a plum tart, bread and dripping, baked apples, a dish of eels, oat cakes, pickled "
        "onions, a rabbit pie, ginger biscuits, a boiled ham, leek broth, toasted cheese, stewed quinces, a seed "
        "cake, pease pudding"
    ),
    "tool": _list(
        "a broken lantern, a coil of wire, a heavy ledger, an iron kettle, a pair of shears, a rusted key, a leather "
        "satchel, a long ladder, a box of chisels, a brass telescope, a wicker basket, a cracked bell, a roll of "
        "canvas, a wooden rake, a pewter jug, a spare wheel, a small anvil, a folding rule"
    ),
    "plant": _list(
        "the apple trees, the beans, the elder hedge, the foxgloves, the hop vines, the lavender, the mulberry, the "
        "plum blossom, the roses, the rye, the hollyhocks, the turnips, the vines on the south wall, the wild garlic, "
        "the young oaks, the cabbages, the raspberry canes, the clover"
    ),
    "mood": _list(
        "anxious, content, cheerful, cross, doubtful, hopeful, impatient, pleased, proud, restless, sorry, "
        "surprised, thoughtful, tired, uneasy, weary, amused, grateful"
    ),
    "manner": _list(
        "at once, with some care, without a word, in good order, by lamplight, before breakfast, after a long "
        "delay, in great haste, as well as could be hoped, to nobody's surprise, with much laughter, in the usual "
        "way, a little too late, against all advice, as if nothing had happened"
    ),
    "when": _list(
        "before noon, after supper, at first light, towards evening, when the bell had rung, in the late "
        "afternoon, as soon as the carts were gone, during the night, on the way home, while the kettle boiled, "
        "between two showers, at low water, when the lamps were lit, after the service"
    ),
    "count": _list("two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, a dozen, a score of"),
    "colour": _list("green, blue, grey, brown, yellow, scarlet, white, black, russet, pale, crimson, faded"),
    "quality": _list(
        "small, narrow, heavy, handsome, crooked, ancient, plain, sturdy, damp, cheap, well made, shabby, "
        "curious, broad, solid, uneven, light, costly"
    ),
    "cold_sky": _list(
        "a hard frost, low cloud, thin snow, a bitter wind from the hills, fog on the river, sleet before dawn, a "
        "clear and freezing sky, ice along the banks, a dull red sun, heavy rain, a thaw, a grey stillness"
    ),
    "warm_sky": _list(
        "a mild haze, bright sun, a warm wind from the south, thunder in the distance, soft rain, a clear sky, "
        "mist over the meadows, heavy dew, a sultry calm, high white clouds, a sudden shower, a fresh breeze"
    ),
    "matter": _list(
        "the price of flour, the state of the roads, the new pump, the church roof, the late coach, the parish "
        "accounts, the height of the river, the lost ferry rope, the school stove, the fair, the tolls, the "
        "bakehouse chimney, the town clock, the empty almshouse, the drains, the coming election, the broken weir"
    ),
    "view": _list(
        "it would come right in time, something must be done soon, nobody was to blame, it had been worse in the "
        "old days, the cost was too high, it was better to wait, the matter was closed, more hands were needed, they "
        "had been badly advised, it could not last, there was nothing in it, the council would have to pay"
    ),
    "feeling": _list(
        "a certain relief, some regret, great patience, more zeal than skill, a good deal of noise, quiet "
        "satisfaction, open disbelief, little hope, much politeness, the greatest interest"
    ),
    "far": _list(
        "the coast, the capital, the hills, the next valley, the salt marshes, the northern mines, the garrison, "
        "the old abbey, the islands, the border, the spa, the university, the shipyards, the forest villages"
    ),
    "kin": _list("aunt, brother, cousin, daughter, father, grandmother, nephew, niece, sister, son, uncle, godmother"),
    "tune": _list("a slow waltz, an old ballad, a march, a hymn, a sailor's catch, a lullaby, a jig, a harvest tune"),
    "instrument": _list("the fiddle, the bass viol, a borrowed flute, the small drum, the church organ, a concertina"),
    "thing_done": _list(
        "mended the pump, swept the yard, whitewashed the passage, cut new pegs, oiled the hinges, sorted the "
        "apples, stacked the firewood, aired the blankets, scoured the pans, patched the sails, sharpened the "
        "scythes, tarred the boats, bottled the cider, counted the sacks, trimmed the lamps, dug over the bean rows"
    ),
}  # fmt: skip

KINDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "weather": (
        (
            "On {date} the day began with {sky}, and it held until {place} was quite hidden from view.",
            "There was {sky} on {date}, the third such morning in a row.",
            "{who} wrote in the weather book that {date} brought {sky} and little else.",
            "After {sky} in the night, {date} turned out better than anyone had expected.",
        ),
        (
            "The wind went round towards evening and shook the shutters of {shop}.",
            "By noon the puddles near {place} had grown together into one {quality} pond.",
            "{people} stayed indoors and talked of {matter}.",
            "Smoke from {shop} lay flat over the roofs and would not rise.",
            "{plant} suffered a little, but not so much as last year.",
            "Those who had to cross the river did so {when}, with their collars turned up.",
            "The glass at {shop} fell, rose and fell again, so that nobody trusted it.",
            "{animal} took shelter under the arch by {place} and was left in peace.",
            "An old {trade} said that such weather never came alone, and was believed.",
            "The path to {place} was {quality} and had to be strewn with ashes.",
            "{who_short} hung {count} sheets on the line and took them in again {when}.",
            "A {colour} light stood over the hills for some minutes and then went out.",
            "The water at {place} rose by the breadth of a hand and went down {manner}.",
            "In the meadows the ground was too soft for carts, and the hay was carried on the back.",
            "{other} lost a hat at {place} and did not go after it.",
        ),
    ),
    "market": (
        (
            "The market of {date} was held at {place}, since the square was being paved.",
            "On {date} there were {count} stalls more than usual, most of them with {goods}.",
            "Trade was slow on {date}, and {people} were blamed for it.",
            "{who} opened the market on {date} by ringing the hand bell {manner}.",
        ),
        (
            "{goods} fetched a fair price, and {goods} hardly any.",
            "A dealer from {far} offered {goods} at half the common rate, and sold out {when}.",
            "{other} bought {tool} that nobody else had wanted.",
            "There was a dispute over a barrel of {goods}, which {who} settled {manner}.",
            "The best {goods} came by barge and were gone before the bell.",
            "{people} stood about in groups and spoke of {matter}.",
            "One of the scales was found to be false, and its owner said that {view}.",
            "A {quality} cart loaded with {goods} blocked the way to {place} until it was pushed aside.",
            "{who_short} sold {count} baskets of eggs and went home {mood}.",
            "For the first time in years there was no {goods} to be had at all.",
            "{animal} walked in among the stalls and upset a tray of {goods}.",
            "Those who came late were content with {food} from the cookshop.",
            "A stranger in a {colour} coat paid for {goods} with foreign coin, which {shop} took by weight.",
            "What was not sold was carried to {place} and kept under {colour} canvas.",
            "The boy at the toll house counted {count} wagons from {far}.",
            "{other_short} asked the price of {goods}, shook {other_his} head and asked again an hour later.",
        ),
    ),
    "river": (
        (
            "On {date} the first barge from {far} made fast at {place}.",
            "The log of the ferry for {date} speaks of {sky} and of {count} crossings.",
            "{who} took the ferry across on {date}, though the ropes were {quality}.",
            "The river was high on {date}, and the lower stage could not be used.",
        ),
        (
            "Its cargo was {goods}, with some {goods} for {shop}.",
            "{people} helped to unload {manner}.",
            "A plank gave way near {place}, but nobody was hurt.",
            "The mate, who came from {far}, said that {view}.",
            "{count} casks of {goods} were rolled up the slope and counted twice.",
            "They waited for the water to fall and passed the time with {tune}.",
            "{other} bought a {quality} rowing boat and painted it {colour}.",
            "At the bend below {place} a sandbank has formed that was not there in spring.",
            "The lock gates stuck again, and {who_short} sent to {shop} for grease.",
            "{animal} crossed with them and gave no trouble.",
            "Nets were spread to dry along {place}, which smelt of tar all day.",
            "An anchor was lost in the deep water and found {when}.",
            "The bargeman's {kin} cooked {food} on deck and shared it with {people}.",
            "The new rope held, and the old one was cut up for mats.",
            "A message in a stoppered bottle turned out to be a bill for {goods}.",
            "{other_short} steered, {who_short} sounded the depth, and neither spoke until they were ashore.",
        ),
    ),
    "letters": (
        (
            "A letter from {far} reached {who} on {date}, much travelled and opened once.",
            "{who} wrote to {who_his} {kin} on {date} and gave the letter to the carrier {when}.",
            "The post of {date} came {manner}, with {count} letters and a parcel for {shop}.",
            "On {date} the postman brought {who} news that had been expected for weeks.",
        ),
        (
            "It said that the journey had been {quality} and that all were well.",
            "There was a long passage about {matter}, which {who_he} read aloud twice.",
            "The writer asked for {goods} and for a little patience.",
            "A dried leaf had been laid between the pages, and a receipt for {goods}.",
            "{other} could not make out the last line and held it to the lamp.",
            "In the margin somebody had drawn {animal}, not badly.",
            "The answer was begun at once, put aside, and finished {when}.",
            "{who_short} kept it behind the clock, where the bills were.",
            "It closed with greetings to {people}, by name and in order of age.",
            "The parcel held {tool}, wrapped in a {colour} cloth.",
            "There was no word in it of the money, and nobody was surprised.",
            "{other_short} was asked for advice and said that {view}.",
            "The hand was {quality} and the spelling that of a {trade}.",
            "It had been written in {count} sittings, each in another ink.",
            "Of {far} it told that winters there are long and the bread is {colour}.",
            "The seal was {colour} and showed a bird with a key.",
        ),
    ),
    "council": (
        (
            "The council met on {date} in the room above {shop}, with {count} members present.",
            "At the sitting of {date} the chair was taken by {who}, {trade}.",
            "The minutes of {date} are short, for the lamp had run out of oil.",
            "On {date} the council heard a complaint about {matter}.",
        ),
        (
            "{who} spoke for some time about {matter} and was heard with {feeling}.",
            "It was agreed that {place} should be fenced before winter.",
            "{other} replied that {view}.",
            "A sum was set aside for {goods}, to be bought from {shop} and from nobody else.",
            "The question of {matter} was put off until the next sitting.",
            "A petition signed by {people} was read, admired and laid on the table.",
            "{count} voted for it and {count} against, and the clerk was asked to count again.",
            "The bill for {goods} was paid, though it was thought to be {quality}.",
            "Two members left early on account of {animal} in the yard.",
            "The office of inspector of weights went to a {trade} of good repute.",
            "{other_short} wished it to be recorded that {other_he} had been {mood} throughout.",
            "The clock at {place} is to be set by the one at {shop}, and not the other way round.",
            "Nobody could say who had ordered {tool}, and it was given to the poorhouse.",
            "Thanks were voted to {people}, who had {thing_done} without being asked.",
            "The meeting closed with {food} at the members' own expense.",
            "A map of {place} was unrolled and found to be upside down.",
        ),
    ),
    "building": (
        (
            "Work on the roof of {shop} began on {date} and was expected to take {count} days.",
            "On {date} the scaffold at {place} was taken down at last.",
            "{who}, who had drawn the plans, came on {date} to see what had become of them.",
            "The wall by {place} gave way on {date}, with more noise than harm.",
        ),
        (
            "The timber was {quality}, and {count} beams had to be sent back.",
            "{people} carried stone from the quarry {when}.",
            "{other} found {tool} behind the panelling and kept it.",
            "The mortar would not set, because of {sky}.",
            "Under the floor lay a layer of {goods}, dry as on the first day.",
            "The door was hung {manner} and now opens the wrong way.",
            "A mason from {far} was asked, and he said that {view}.",
            "Window frames were painted {colour}, which some found too bold.",
            "{who_short} measured everything twice and wrote the figures on {who_his} cuff.",
            "The old bricks were sold to {shop} for the price of the carting.",
            "Nobody remembered when the last repair had been made.",
            "They dug down to firm clay and found the roots of {plant}.",
            "A swallow had built in the gutter, and the work there was left until autumn.",
            "{other_short} fell from the second rung of the ladder and walked home {mood}.",
            "The chimney draws well now, even with {sky}.",
            "{food} and a small barrel were set out for the men.",
        ),
    ),
    "garden": (
        (
            "In the garden behind {shop} {plant} came on well, and on {date} the first of them were cut.",
            "{who} spent {date} among the beds and went in only when it grew dark.",
            "On {date} the frames were opened, for there was {sky}.",
            "The gardeners' society met on {date} at {place} and talked of nothing but {plant}.",
        ),
        (
            "{plant} were tied up with strips of {colour} cloth.",
            "{animal} had been at the lettuces again.",
            "Along the wall {who_short} set out {count} rows of seedlings, a hand apart.",
            "{other} brought a cutting from {far}, wrapped in wet moss.",
            "The soil near {place} is heavy and wants sand.",
            "A net of {quality} string was stretched over the cherries.",
            "{people} were allowed to gather what lay on the ground.",
            "{plant} did better than {plant}, and nobody could say why.",
            "The well was low, so that water was carried from {place}.",
            "{other_short} advised soot, {who_short} held by ashes, and the slugs took no side.",
            "Under the pear tree a {quality} bench was set up, made at {shop}.",
            "Seed was saved in twists of paper and laid in a {colour} tin.",
            "The hedge was cut lower, and now one can see as far as {place}.",
            "Of last year's planting only {plant} were left.",
            "Weeds stood high between the stones, and {count} barrows of them were wheeled away.",
            "In the evening they ate {food} out of doors, with {sky}.",
        ),
    ),
    "school": (
        (
            "The school opened again on {date} with {count} new pupils.",
            "On {date} the inspector from {far} came to hear the children read.",
            "{who} taught the upper class on {date}, since the master was ill.",
            "The children had a holiday on {date} because of {sky}.",
        ),
        (
            "They learned the rivers by heart and forgot them {when}.",
            "The stove smoked, and the lesson was held at {place}.",
            "A boy had brought {animal} in a basket, and it was sent home with him.",
            "{other} explained the use of {tool}, which pleased them more than grammar.",
            "Slates were wiped, caps were found, and {people} waited at the gate.",
            "The best copybook belonged to the {kin} of a {trade}.",
            "{who_short} read them a tale about a {quality} castle and stopped at the worst moment.",
            "Sums were done with {goods} instead of numbers, and came out better.",
            "Ink froze in the wells in winter, and nobody had forgotten it.",
            "The smaller ones drew {plant} from life.",
            "One girl asked why {place} was so called, and there was no answer.",
            "A window had been broken {when}, and for once somebody owned up.",
            "They sang {tune} for the visitors, {manner}.",
            "For dinner there was {food}, of which little was left.",
            "The prize, {tool}, was drawn by lot.",
            "{other_short} was {mood} about the spelling and said so to the parents.",
        ),
    ),
    "inn": (
        (
            "There was a full house at the inn on {date}, what with the fair and {sky}.",
            "On {date} {people} sat late at the inn by {place}.",
            "{who} took a room at the inn on {date} and asked not to be called.",
            "The talk at the inn on {date} was all of {matter}.",
        ),
        (
            "A {trade} from {far} told how he had lost his way and found {tool}.",
            "{other} said that {view}, and ordered {food}.",
            "Somebody played {tune} on {instrument}, and the dogs left the room.",
            "The landlord's {kin} served {food} and kept the score on a slate.",
            "Two {quality} chairs were broken, neither of them in anger.",
            "A wager was made about {matter}, with {goods} for the stake.",
            "They moved closer to the fire, for there was {sky}.",
            "{who_short} listened with {feeling} and paid for everybody.",
            "Beds being few, {count} guests slept in the loft above {shop}.",
            "The host showed a {colour} stone that had come down with the flood.",
            "An old {trade} fell asleep and was carried home {manner}.",
            "{people} came in {when} and wanted to hear it all again.",
            "The door stood open, and {animal} looked in and went away.",
            "Nobody believed the story of the bell under the water, though all knew it.",
            "{other_short} left {other_his} gloves behind and came back for them {mood}.",
            "When the last candle was out, one could hear the weir.",
        ),
    ),
    "road": (
        (
            "The coach from {far} came in on {date} with one wheel tied up in rope.",
            "{who} walked to {far} and back, and was home again on {date}.",
            "On {date} the road beyond {place} was open for the first time since the flood.",
            "Carriers who came through on {date} brought {goods} and bad news of the roads.",
        ),
        (
            "Beyond {place} the track is {quality}, and horses have to be led.",
            "{people} had laid branches over the worst of it.",
            "At the milestone sat a {trade} who mended {tool} for his supper.",
            "They met nobody but {animal}.",
            "{other} went part of the way and turned back at {place}.",
            "A bridge of {count} planks does for the present.",
            "In the inn at the crossing they were given {food} and a dry corner.",
            "The driver said that {view}, and drove on {manner}.",
            "Along the ditch stood {plant}, higher than a man.",
            "From the top of the hill one sees {far} on a clear day, and {place} on any day.",
            "With {sky} it took {count} hours where it used to take half of that.",
            "The milk cart had gone the other way, so they carried their bundles themselves.",
            "{who_short} had new boots from {shop} and was {mood} on account of them.",
            "A signpost had been turned by some joker and was set right {when}.",
            "One of the passengers, a {kin} of the {trade}, sang {tune} until he was asked to stop.",
            "Their load was {goods}, well covered, and {tool} that belonged to nobody.",
        ),
    ),
    "household": (
        (
            "On {date} {who} turned out the whole house from the attic down.",
            "The household book for {date} lists {goods}, {goods} and a new broom.",
            "{who} and {other} shared the work on {date}, not quite evenly.",
            "It was washing day on {date}, in spite of {sky}.",
        ),
        (
            "They {thing_done} and {thing_done}, and were done {when}.",
            "In a drawer they found {tool} that had been missed for years.",
            "Supper was {food}, with {food} to follow.",
            "The kettle was sent to {shop} to have its handle set straight.",
            "{other} {thing_done} {manner}.",
            "Curtains of {colour} stuff were hung in the front room.",
            "A {quality} chest was moved to the landing, where it has been in the way since.",
            "{animal} had to be driven from the pantry.",
            "The {kin} of {who_short} came by and said that {view}.",
            "There was too little {goods} in the house, and too much {goods}.",
            "Each shelf was lined with paper from the printing house.",
            "{who_short} darned {count} pairs of stockings by the window.",
            "The cellar was damp, and the {goods} had to be brought up.",
            "They quarrelled about {matter} and made it up over {food}.",
            "Beeswax and patience gave the table its old shine.",
            "Through the wall they heard {tune}, the same {count} bars over and over.",
        ),
    ),
    "feast": (
        (
            "The feast of {date} was kept at {place}, as it had been since anyone could remember.",
            "On {date} there was a wedding, and {people} were given half a day.",
            "{who} led the procession on {date}, carrying {tool} on a cushion.",
            "For {date} the choir had learned {tune}.",
        ),
        (
            "Long tables were laid with {food} and {food}.",
            "{people} danced until the musicians begged for rest.",
            "{other} played {instrument} with {feeling}.",
            "Garlands made from {plant} hung over the door of {shop}.",
            "A speech about {matter} was cut short by {sky}.",
            "The prize for the best {goods} went to a {trade} from {far}.",
            "There was a race round {place}, won by the youngest.",
            "Lanterns of {colour} paper were lit {when}.",
            "{animal} was led about with a ribbon and behaved well.",
            "The {kin} of the bride wept, and was given {food}.",
            "An acrobat walked along a rope from {shop} to the pump.",
            "They drank to absent friends, and to {people}.",
            "{who_short} was {mood} the next morning and blamed the cider.",
            "A child got lost and was found asleep among sacks of {goods}.",
            "Towards the end {tune} was asked for, and all joined in.",
            "The last guests went home {manner}.",
        ),
    ),
    "workshop": (
        (
            "At {shop} a new apprentice was taken on, on {date}, the {kin} of a {trade}.",
            "On {date} {shop} had more orders than hands.",
            "{who} finished {tool} on {date} after {count} weeks of work.",
            "The tools at {shop} were counted on {date}, and one was missing.",
        ),
        (
            "The boy {thing_done}, {thing_done}, and was shown how to hold a file.",
            "An order for {goods} came from {far}, to be ready before the fair.",
            "{other} looked at the work and was {mood} about it.",
            "The wheel ran true at last, and {people} came to look.",
            "For the handle they took ash, for the rest whatever was {quality}.",
            "{who_short} will not hear of machines and says that {view}.",
            "The forge was cold for {count} days, for want of coal.",
            "A customer returned {tool}, saying that it was too {quality}.",
            "Sparks fell on the bench and burnt a row of {colour} marks.",
            "At noon they ate {food} on the step and watched {animal}.",
            "Glue was boiled {when}, and the whole lane knew of it.",
            "The master's {kin} keeps the books, in a {colour} ink of her own.",
            "Good {goods} had become so dear that they mixed it with the old.",
            "Whoever spoils a piece has to sing {tune}.",
            "{other_short} paid for the work with {goods}, which was agreed to be fair.",
            "The sign over the door was painted afresh in {colour} and gold.",
        ),
    ),
    "visitors": (
        (
            "A painter came from {far} on {date} and set up his easel at {place}.",
            "On {date} {who} showed a party of strangers round the town.",
            "Surveyors with flags and chains were seen near {place} on {date}.",
            "On {date} a {trade} who had left the town as a boy came back to look at it.",
        ),
        (
            "They wished to see {place}, and were shown {shop}.",
            "One of them wrote down everything in a {colour} notebook.",
            "{people} stared at first and then brought {food}.",
            "{other} was asked about {matter} and answered {manner}.",
            "He thought the houses {quality} and the people {mood}.",
            "They bought {tool} as a keepsake and forgot it at the inn.",
            "The lady had been to {far} and compared everything with it.",
            "{who_short} told them the tale of the flood, which grows with every telling.",
            "With {sky} there was not much to be seen from the tower.",
            "They left {when}, and the town went back to {matter}.",
            "{animal} followed them as far as {place}.",
            "He knew every corner of {place}, but nobody knew him.",
            "A likeness of the {trade} was drawn in charcoal and hangs at {shop} now.",
            "Their trunk held {goods} and {count} pairs of shoes.",
            "In return they sent a crate of {goods}, with thanks.",
            "What they wanted in the end, nobody found out; {other_short} thinks that {view}.",
        ),
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print text of our own: the chronicle of a small river town.")
    parser.add_argument("characters", type=int, help="at least so many, up to the end of a paragraph")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sys.stdout.write(text(args.characters, args.seed))


__all__ = ["KINDS", "SLOTS", "paragraphs", "sentences", "text"]

if __name__ == "__main__":
    main()
