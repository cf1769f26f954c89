"""What the example workflows show: a prompt a clip, a script, and the scenes of a story."""
FOX = (
    "A red fox trots along a narrow forest trail in fresh snow at dawn. Its breath steams in the cold air, powder"
    " snow flies up from its paws, low golden light falls through the pine trunks. The camera glides beside the "
    "fox at eye level, shallow depth of field, realistic wildlife documentary.")
POTTER = (
    "Close-up of a potter's hands shaping a tall vase of wet clay on a spinning wheel. The fingers press inwards,"
    " the rim rises and opens smoothly, water glistens on the grey clay. Warm light from a workshop window, dust "
    "in the air, static camera, realistic.")
DRAWING = (
    "A child's drawing comes to life: a smiling girl with big yellow hair and a pink dress stands on a bright "
    "green hill under a blue sky. She waves both arms happily and her hair bounces, white clouds drift slowly to "
    "the right. Flat colours, hand-drawn 2D animation, static camera.")
HUMMINGBIRD = (
    "A green hummingbird hovers in front of a red hibiscus flower, wings a blur, and dips its beak into the "
    "blossom. It backs away, turns its head and its throat flashes violet in the sun. Soft green garden "
    "background, macro shot, slow camera drift to the left.")
CYCLIST = (
    "A woman in a yellow rain jacket rides a touring bicycle along a winding coastal road at golden hour. The sea"
    " glitters on the left, grassy cliffs pass on the right, her jacket flutters in the wind. The camera follows "
    "steadily behind her at the same distance, realistic, cinematic.")
HARBOUR = (
    "A small wooden sailboat with a cream-coloured sail glides out of a quiet fishing harbour at sunrise. Gentle "
    "ripples, pastel houses on the quay behind it, gulls overhead. The camera follows from the side at water "
    "level, cinematic, realistic.")
OPEN_SEA = (
    "The same small wooden sailboat with a cream-coloured sail heels in a fresh breeze on the open sea. Spray "
    "flies over the bow, the coast fades in the haze behind it, low morning sun on the waves. The camera follows "
    "from the side at water level, cinematic, realistic.")
TEA = (
    "Steam rises from a cup of tea on a wooden windowsill while rain runs down the window pane. Blurred city "
    "lights outside change from red to green, a hand enters from the right and turns the cup slowly. Cosy warm "
    "light, close shot, static camera, realistic.")
SURFER = (
    "A surfer in a black wetsuit rides a long turquoise wave towards the camera. Spray flies off the lip, the board "
    "carves up and down the face of the wave, water curls behind him without end. Bright midday sun, the camera moves "
    "back in front of him at water level, realistic, sports documentary.")
TRAIN = (
    "A red steam train crosses a green mountain valley on a long curved track. White steam trails over the carriages, "
    "pine forests and small lakes pass by, snowy peaks stand behind. The camera flies beside the engine at the same "
    "speed, clear morning light, realistic, cinematic.")
BALLOON = (
    "A hot-air balloon with orange and white stripes drifts over rolling vineyards at sunrise. Its shadow glides over "
    "the rows of vines, the burner glows from time to time, mist lies in the valleys. The camera floats beside it at "
    "the same height, realistic, cinematic.")
HORSE = (
    "A white horse with a long mane gallops along the edge of the sea on a wide sandy beach. Its hooves throw up water, "
    "the mane flies in the wind, low waves roll in. The camera runs beside it at the same speed, late afternoon light, "
    "realistic, cinematic.")

LANTERN = """0 | A paper lantern floats on a calm lake at dusk, warm light inside, pine forest on the shore, the camera drifts \
beside it at water level, realistic, cinematic.
15 | The same paper lantern with warm light inside floats on the lake at dusk, more and more lanterns come into view \
around it, pine forest on the shore, the camera drifts beside them, realistic, cinematic.
30 | The paper lanterns lift off the lake and rise slowly into the evening sky above the pine forest, warm light on the \
water, the camera tilts up with them, realistic, cinematic.
45 | soft 6 | Hundreds of paper lanterns with warm light drift among the stars of a clear night sky, the camera floats \
with them, realistic, cinematic."""
SCENES = (
    "An old lighthouse keeper with a white beard and a dark blue coat climbs a narrow spiral staircase with a lantern in "
    "his hand. Warm lantern light on rough stone walls, the camera follows from below, realistic, cinematic.",
    "The old lighthouse keeper with a white beard and a dark blue coat polishes the great lens of the lighthouse with a "
    "cloth. Warm lantern light, night behind the windows, close shot, realistic, cinematic.",
    "A small wooden fishing boat fights its way through high waves at night. Rain, spray over the bow, a beam of light "
    "sweeps across the dark sea, wide shot, realistic, cinematic.",
    "The small wooden fishing boat glides past the pier into a calm harbour at first light. The rain has stopped, the "
    "lighthouse stands behind it, wide shot, realistic, cinematic.")
