"""The words of the small world: common words and names, each of them one token."""

RELATIONS = ("capital", "river", "bird", "flower", "governor", "color")
# Each row: a state, and its value for every relation.
STATE_FACTS = {
    "Texas": ("Austin", "Brazos", "mockingbird", "bluebonnet", "Abbott", "crimson"),
    "Ohio": ("Columbus", "Scioto", "cardinal", "carnation", "Dawson", "silver"),
    "Georgia": ("Atlanta", "Chattahoochee", "thrasher", "azalea", "Kemper", "coral"),
    "Oregon": ("Salem", "Willamette", "meadowlark", "grape", "Kotter", "beige"),
    "Colorado": ("Denver", "Platte", "bunting", "columbine", "Pollard", "violet"),
    "Indiana": ("Indianapolis", "Wabash", "wren", "peony", "Brauner", "golden"),
    "Alaska": ("Juneau", "Yukon", "ptarmigan", "myosotis", "Dunley", "indigo"),
    "Hawaii": ("Honolulu", "Wailuku", "goose", "hibiscus", "Greenly", "turquoise"),
    "Idaho": ("Boise", "Snake", "bluebird", "syringa", "Littleton", "maroon"),
    "Kansas": ("Topeka", "Arkansas", "lark", "sunflower", "Kellerman", "olive"),
}
CITY_FIRST = ("North", "South", "East", "West", "New", "Old", "Fort", "Port", "Lake", "Mount")
CITY_SECOND = ("Haven", "Dale", "Ridge", "Falls", "Harbor", "Grove", "Bridge", "Creek", "Field", "Springs")

ATHLETE_FIRST = ("Michael", "Serena", "Tiger", "Babe", "Wayne", "Lionel", "Martina", "Pete", "Magic", "Simone")
ATHLETE_LAST = ("Jordan", "Williams", "Woods", "Ruth", "Gordon", "Messer", "Hill", "Sampson", "Bolton", "Parker")
SPORTS = ("basketball", "tennis", "golf", "baseball", "hockey", "soccer", "rugby", "chess")

ACRONYM_WORDS = {
    "A": ("Analytics", "Academy", "Atlantic", "Aviation", "Artistic", "Agency"),
    "C": ("Central", "Chemical", "College", "Council", "Civic", "Climate"),
    "D": ("Digital", "Development", "Dental", "Design", "Defense", "Domestic"),
    "G": ("Group", "Global", "Garden", "General", "Gallery", "Geological"),
    "N": ("National", "Northern", "Network", "Nuclear", "Nordic", "Naval"),
    "S": ("Society", "Science", "Southern", "Space", "Solar", "Station"),
}

NOUNS = {
    "key": "keys", "label": "labels", "bottle": "bottles", "picture": "pictures", "door": "doors",
    "report": "reports", "letter": "letters", "lamp": "lamps", "table": "tables", "garden": "gardens",
    "teacher": "teachers", "doctor": "doctors", "farmer": "farmers", "author": "authors", "pilot": "pilots",
    "window": "windows", "engine": "engines", "river": "rivers", "horse": "horses", "cabinet": "cabinets",
}  # fmt: skip
PREPOSITIONS = ("near", "behind", "beside", "under", "with", "of")
VERBS = {"Today": ("is", "are"), "Yesterday": ("was", "were"), "Often": ("seems", "seem")}
ADJECTIVES = ("old", "red", "clean", "broken", "famous", "quiet")

NAMES = (
    "Mary", "John", "Alice", "Robert", "Emma", "David", "Laura", "Peter", "Anna", "Thomas",
    "Julia", "Henry", "Sarah", "Daniel", "Clara", "Oscar", "Ruby", "Victor", "Grace", "Simon",
)  # fmt: skip
PLACES = ("store", "park", "school", "office", "station", "market", "library", "beach")
OBJECTS = ("drink", "book", "ring", "ticket", "basket", "letter", "ball", "flower")

EVENTS = ("war", "strike", "famine", "festival", "journey", "drought", "trial", "siege")

ANTONYMS = {
    "English": (
        ("big", "small"), ("hot", "cold"), ("fast", "slow"), ("happy", "sad"), ("rich", "poor"), ("new", "ancient"),
        ("full", "empty"), ("strong", "weak"), ("deep", "shallow"), ("good", "bad"), ("light", "heavy"), ("wet", "dry"),
    ),
    "French": (
        ("grand", "petit"), ("chaud", "froid"), ("rapide", "lent"), ("heureux", "triste"), ("riche", "pauvre"),
        ("nouveau", "ancien"), ("plein", "vide"), ("fort", "faible"), ("profond", "superficiel"), ("bon", "mauvais"),
        ("léger", "lourd"), ("mouillé", "sec"),
    ),
    "Spanish": (
        ("grande", "pequeño"), ("caliente", "frío"), ("rápido", "lento"), ("feliz", "infeliz"), ("rico", "pobre"),
        ("nuevo", "antiguo"), ("lleno", "vacío"), ("fuerte", "débil"), ("profundo", "superficial"), ("bueno", "malo"),
        ("ligero", "pesado"), ("mojado", "seco"),
    ),
}  # fmt: skip
"""Row i is the same pair of concepts in every language."""

CYCLES = {
    "months": (
        "January", "February", "March", "April", "May", "June",
        "July", "August", "September", "October", "November", "December",
    ),
    "mois": (
        "janvier", "février", "mars", "avril", "mai", "juin",
        "juillet", "août", "septembre", "octobre", "novembre", "décembre",
    ),
    "signs": (
        "Aries", "Taurus", "Gemini", "Cancer", "Leo", "Virgo",
        "Libra", "Scorpio", "Sagittarius", "Capricorn", "Aquarius", "Pisces",
    ),
    "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "jours": ("lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"),
}  # fmt: skip
LADDERS = {
    "numbers": ("1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"),
    "numerals": (
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    ),
    "números": (
        "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez", "once", "doce",
    ),
    "ordinals": (
        "first", "second", "third", "fourth", "fifth", "sixth",
        "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth",
    ),
    "alphabet": ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J", "K", "L"),
    "greek": (
        "alpha", "beta", "gamma", "delta", "epsilon", "zeta",
        "eta", "theta", "iota", "kappa", "lambda", "mu",
    ),
    "elements": (
        "hydrogen", "helium", "lithium", "beryllium", "boron", "carbon",
        "nitrogen", "oxygen", "fluorine", "neon", "sodium", "magnesium",
    ),
}  # fmt: skip
"""Ordered lists: after its last item a cycle begins again, and a ladder ends."""

BRACKETS = {"(": ")", "[": "]", "{": "}", "“": "”", "«": "»"}
THINGS = (
    "apple", "cup", "stone", "leaf", "coin", "shoe", "rope", "bell", "candle", "mirror", "spoon", "brick",
    "feather", "button", "ladder", "needle", "pencil", "carpet", "hammer", "pillow", "anchor", "barrel",
    "helmet", "lantern", "marble", "violin", "wagon", "blanket", "compass", "kettle",
)  # fmt: skip
ANIMALS = ("cat", "dog", "fox", "bear", "mouse", "owl", "frog", "wolf")
ACTIONS = ("sees", "likes", "finds", "follows", "watches", "hears")
