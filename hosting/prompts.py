"""What a hypersolver learns from unless other prompts are given: a hundred that suit any checkpoint.

Neighbours differ in subject, style and distance. None asks for text in the image, for a known person, or for
what only some models know.
"""
PROMPTS = tuple(line.strip() for line in """
    portrait photo of an old fisherman with a grey beard, soft window light
    a red fox sleeping in fresh snow, close-up
    wide mountain valley at sunrise, mist over a river
    a cosy kitchen with copper pans and herbs hanging from the ceiling
    a bowl of ramen with egg and spring onions, seen from above
    a green glass bottle on a wooden table, still life, oil painting
    watercolor of a sailing boat in a small harbour
    a busy street market at night in the rain, neon lights, reflections
    a young woman laughing in a sunflower field, 35mm film
    macro photo of a bee on a purple thistle
    an empty desert road under a dramatic stormy sky
    a modern living room with a large sofa and concrete walls
    chocolate cake with raspberries on a white plate, studio light
    a vintage bicycle leaning against a blue door
    pencil sketch of a horse galloping
    aerial view of a city at dusk, thousands of lit windows
    a boy with freckles eating a slice of watermelon, summer afternoon
    an owl on a branch staring into the camera, dark forest
    turquoise sea and white cliffs, bright midday sun
    a library with spiral stairs and tall shelves, warm lamps
    a pile of oranges and lemons in a wicker basket
    a pair of worn leather boots, product photo, plain background
    anime girl with silver hair standing in the wind, cherry blossoms
    an astronaut walking on a red planet, wide shot
    two elderly friends playing chess in a park
    a tabby kitten in a cardboard box
    autumn forest with a narrow path, golden leaves, fog
    a baroque church interior, light beams through high windows
    fresh bread and butter on a checked tablecloth, rustic
    a mechanical pocket watch opened to show its gears, macro
    low poly 3d render of an island with palm trees
    a steam train crossing a stone bridge, black and white photo
    a ballerina tying her shoe backstage, dim light
    a whale breaching beside a small boat, storm
    rolling green hills with sheep, spring morning
    a tiny apartment balcony full of potted plants
    sushi platter on black slate, dark moody lighting
    a cluster of colourful balloons against a clear sky
    ukiyo-e style print of a heron in reeds
    a crowded subway carriage, candid photography
    a blacksmith hammering glowing iron, sparks flying
    a parrot with blue and yellow feathers, white background
    a frozen waterfall in a narrow gorge
    a child's bedroom with a bunk bed and a toy train
    a cup of cappuccino with foam art on a marble counter
    an old brass telescope on a tripod by the window
    impressionist painting of a picnic beside a pond
    a futuristic city with flying cars, golden hour, concept art
    a woman in a red raincoat crossing an empty square
    a school of silver fish around a coral reef, underwater photo
    sand dunes with long shadows, minimalist
    a greenhouse with iron frames and orchids
    pancakes with maple syrup and blueberries, breakfast table
    a grand piano in an abandoned ballroom
    flat vector illustration of a lighthouse at night
    rows of terraced houses with colourful fronts
    portrait of a king in ornate armour, dramatic light, renaissance painting
    a husky pulling a sled, snow spraying, action shot
    a lake with perfect reflections of pine trees, blue hour
    a narrow hallway with patterned tiles and a single lamp
    grilled fish with lemon and herbs on a blue plate
    a stack of old books beside a burning candle
    clay figure of a smiling snail, stop motion style
    a harbour with container cranes in heavy fog
    a street musician playing the violin, shallow depth of field
    a dragonfly resting on a blade of grass, dew drops
    a volcano erupting at night, lava flows
    a log cabin interior with a fireplace and a sleeping dog
    cherry tomatoes on the vine, water drops, extreme close-up
    a silver sports car on a coastal road, motion blur
    pastel drawing of a sleeping cat on a windowsill
    a castle on a cliff above the clouds, fantasy
    a grandmother knitting in an armchair, warm afternoon light
    a herd of elephants crossing a dry plain, dust, telephoto
    rice terraces after rain, vivid greens
    a small bakery seen through its window, early morning
    a glass of white wine and a cheese board, outdoor terrace
    a wooden chair in an empty white room
    pixel art of a spaceship above a purple planet
    a wide river delta seen from space
    a man in a wool coat and hat, studio portrait, grey backdrop
    a frog with bright green skin on a wet leaf
    a rainbow over a wheat field after a thunderstorm
    a laboratory with glassware full of colourful liquids
    a pizza with basil coming out of a stone oven
    a bouquet of peonies in a porcelain vase, dark background
    comic book drawing of a masked hero on a rooftop, bold ink lines
    a rope bridge over a jungle ravine
    three children building a sand castle on the beach
    a white horse standing in shallow water at sunset
    northern lights above a frozen lake with a red cabin
    a workshop with hand tools on the wall and wood shavings on the floor
    a jar of honey with a wooden dipper, backlit
    a hot air balloon over a valley of strange rocks
    stained glass window with a pattern of birds and vines
    an empty stadium under floodlights, wide angle
    a nurse with tired eyes smiling, natural light, close-up
    a hedgehog among mushrooms and fallen leaves
    a stormy sea breaking over a pier, long exposure
    origami crane made of gold paper on a black table
""".strip().splitlines())
DOZEN = PROMPTS[::9]
"""As many as levels and weights are learned from."""
