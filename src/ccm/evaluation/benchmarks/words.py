"""English words for texts that are made up: the list is kept here, so that the same texts come out everywhere."""

from __future__ import annotations

from ...data.pools import words

ADJECTIVES = words(
    """
    able aged amber ancient angry bare big bitter blank blunt bold brave brief bright broad broken brown busy calm
    careful cheap chilly clean clear clever cloudy cold common cosy crisp cruel curious curly damp dark dear deep
    dense dim dirty dizzy dry dull dusty eager early easy empty equal exact faint fair famous fancy fast fierce
    final fine firm flat fond free fresh frosty full funny gentle giant glad golden grand grave great green grey
    happy hard harsh heavy hidden high hollow honest huge humble hungry icy idle jolly keen kind large late lazy
    lean light little lively lonely long loud lucky mad major merry mild misty modern modest narrow near neat new
    noble noisy odd old open orange pale patient plain polite poor proud pure quick quiet rapid rare raw ready rich
    ripe rough round royal rude rusty sad safe salty sandy scarce secret serious shallow sharp shiny short shy
    silent silver simple slim slow small smart smooth soft solid sour spare steady steep stern stiff strange strict
    strong sudden sunny sweet swift tall tame tart tender thick thin tidy tight tiny tired tough true vague vast
    warm wary weak weary wet white wide wild wise witty wooden yellow young
    """
)
NOUNS = words(
    """
    acorn actor anchor ankle apple apron arrow artist attic author badge bakery balcony bamboo banjo barn barrel
    basket beach beacon beard beaver bell bench berry bicycle blanket boat book boot bottle bowl branch bread brick
    bridge broom brush bucket butter button cabin cactus camel camera candle canoe canvas carpet carrot castle
    cellar chain chair chalk cherry chest chimney circle circus cliff clock cloud coast coat coffee comet compass
    copper coral corner cotton couch crane crater crow crown cup curtain daisy dancer desert desk diamond dinner
    doctor dolphin donkey door dragon drawer drum eagle ear echo elbow engine envelope farmer feather fence fiddle
    field finger fire fish flag flower flute forest fork fountain fox frame frog garden garlic gate giraffe glacier
    glass globe glove goat goose grain grape guitar hammer harbour harp hat hawk helmet hill hive honey horn horse
    hotel house ink island ivory jacket jewel journey judge jungle kettle key kite kitchen knee knight ladder lake
    lamp lantern lawyer leaf lemon letter library lily lion lizard lock magnet mango maple marble market mask meadow
    melon mill mirror monkey moon moss motor mountain mouse mouth mushroom nail napkin needle nest net night
    notebook nurse oak ocean olive onion orchard otter oven owl paddle painter palace panda paper parrot path peach
    pear pearl pebble pencil pepper piano pigeon pillow pilot pine pirate planet plate plum pocket poet pond pony
    potato prince pumpkin puppet queen quilt rabbit radio raft railway rain raven ribbon river road robin rocket
    roof rope rose saddle sailor salad salmon sand scarf school seed shadow sheep shelf shell ship shirt shoe
    shoulder signal singer sister skate sky sleeve snail snow soap soldier song soup spider spoon spring squirrel
    stable stairs star station statue stone storm stove straw street string sugar summer sun sweater swan table
    tailor teacher temple tent thumb tiger tomato tongue tower train tree truck trumpet tulip tunnel turtle umbrella
    uncle valley vase village violin wagon wall walnut watch water wave whale wheat wheel whistle willow window wing
    winter wizard wolf wood wool zebra
    """
)
