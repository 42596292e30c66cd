"""Kinds of texts whose words mislead: what is asked decides, not what it is about."""

from __future__ import annotations

import pytest
import routing
from helpers import user

LONG_MAIL = (
    "Hi all, please book a slot in the calendar before Friday 14:00, send me the list of your "
    "devices and switch off the lights in the office. The meeting on Monday is cancelled. Remind "
    "Tom to call the plumber and to order the lamps. The file is on the shared drive. Best, Helen"
)


@pytest.fixture(scope="module")
def decide():
    return routing.deciding()


@pytest.mark.parametrize(
    ("text", "category"),
    [
        # a topic beside the writing that is asked for
        ("Write a job advert for a frontend engineer", "conversation"),
        ("Rédige une annonce pour recruter un développeur Python", "conversation"),
        ("Draft a speech about thermostats and calendars", "conversation"),
        ("Write a poem about a SQL query", "conversation"),
        ("Write a function that sends an email", "code"),
        ("Write a note parser in JavaScript", "code"),
        ("Create a file called notes.txt in the documents folder", "tools"),
        # clocks, days and devices in word problems
        ("A clock gains 3 minutes every hour. How many minutes is it fast after 8 hours?",
         "reasoning"),
        ("Un réveil sonne toutes les 20 minutes. Combien de fois sonne-t-il en 3 heures ?",
         "reasoning"),
        ("Two lamps use 40 and 60 watts. How much do they use in five hours?", "reasoning"),
        # a name alone says nothing
        ("Who played Spock in Star Trek?", "conversation"),
        ("Where was Marie Curie born?", "conversation"),
        ("Guten Abend, mein Name ist Anna", "conversation"),
        # words that look like others
        ("J'ai raté mon gâteau, que dire à ma belle-mère ?", "conversation"),
        # pasted material
        (f"What does she want in one sentence?\n\n{LONG_MAIL}", "conversation"),
        (f"Translate the following mail into French:\n\n{LONG_MAIL}", "conversation"),
        (f"{LONG_MAIL}\n\nCan you summarize this for my father?", "conversation"),
        # how-to questions
        ("How do I cancel a dinner politely?", "conversation"),
        ("Comment envoyer une carte postale depuis le Japon ?", "conversation"),
        ("How do I schedule a job with cron?", "code"),
        # what is on now is no question of fact
        ("Quelle heure est-il à Tokyo ?", "tools"),
        ("What is the price of gold right now?", "tools"),
        ("Who won the match last night?", "tools"),
    ],
)  # fmt: skip
def test_what_is_asked_decides_not_what_it_is_about(decide, text, category):
    assert decide([user(text)]).category == category


def test_trivia_questions_do_not_go_to_tools(decide):
    names = ("Ada Lovelace", "Louis Armstrong", "Frida Kahlo", "Isaac Newton", "Edith Piaf")
    shapes = ("Who was {}?", "What is {} famous for?", "In which country was {} born?",
              "Qui était {} ?", "Wer war {}?", "¿Quién fue {}?", "Chi era {}?")  # fmt: skip

    asked = [shape.format(name) for shape in shapes for name in names]
    asked += [
        "Which band released the album Rumours in 1977?",
        "Who designed the Sydney Opera House?",
        "Which Shakespeare play features Iago?",
        "Qui a remporté le Tour de France en 1985 ?",
        "In what year did the Berlin Wall fall?",
    ]
    assert [text for text in asked if decide([user(text)]).category == "tools"] == []


@pytest.mark.parametrize("shape", ["Quick question: {}", "Petite question : {}", "Hi there! {}",
                                   "{}\nThanks in advance!", "{} Merci d'avance."])  # fmt: skip
@pytest.mark.parametrize(
    ("text", "category"),
    [("turn off the lamp in the hallway", "tools"), ("éteins la lampe du couloir", "tools"),
     ("why does my Python loop never end?", "code"), ("prove that 7 is prime", "reasoning")],
)  # fmt: skip
def test_what_stands_around_a_request_changes_nothing(decide, shape, text, category):
    assert decide([user(shape.format(text))]).category == category
