/** Every text of the panels, in one table. Another language is another table; what it lacks is shown in English. */

const en = {
  'kind.recache': 'recache', 'kind.keep': 'keep', 'kind.soft': 'soft', 'kind.flush': 'flush', 'kind.jump': 'jump',
  'kind.cut': 'cut',

  'timeline.label': 'Prompt timeline',
  'timeline.add': 'Add', 'timeline.add.tip': 'Add a prompt at the end',
  'timeline.split': 'Split', 'timeline.split.tip': 'Split the selected prompt (S: where the pointer is)',
  'timeline.delete': 'Delete', 'timeline.delete.tip': 'Delete the selected prompt (Delete)',
  'timeline.undo': 'Undo (Ctrl+Z)', 'timeline.redo': 'Redo (Ctrl+Y)',
  'timeline.closer': 'Zoom in', 'timeline.farther': 'Zoom out',
  'timeline.start': 'Start of the selected prompt, in seconds',
  'timeline.start.short': 'start',
  'timeline.transition': 'Transition to the selected prompt',
  'timeline.default': 'default: {kind}',
  'timeline.blocks': 'Blocks that the soft transition takes', 'timeline.blocks.short': 'blocks',
  'timeline.segment': 'Prompt {number} of {count}, from {start} to {end}, {kind}',
  'timeline.firstKind': 'first', 'timeline.end': 'the end',
  'timeline.hint': 'Drag, or arrows move · Shift+arrows: start only · Enter: text · S: split · Delete',
  'timeline.editHint': 'Enter: done · Escape: as before',
  'timeline.linked': 'The script comes from a connected node. Edit it there.',
  'timeline.line': 'Line {line}: {text}',

  'error.empty': 'The prompt script is empty. Write one line a prompt: 0 | a red ball rolls along a floor.',
  'error.time': '"{text}" does not begin with a time. Write for example 5 | {text}, and a long prompt in one line.',
  'error.bars': 'More than a time, a transition and a prompt. Remove the | inside the prompt.',
  'error.noPrompt': 'There is no prompt behind the time. Write one, or remove the line.',
  'error.clock': '"{text}" is not a time. Write minutes:seconds below 60, or seconds alone.',
  'error.transition': '"{text}" is not a transition. Use one of {kinds}, or soft with a number of blocks (soft 6).',
  'error.jsonLines': 'The text holds {count} JSON lines, and each is a video of its own. Leave one of them.',
  'error.json': 'This is not JSON. Write {"prompts": ["first", "second"]} in one line.',
  'error.jsonPrompts': 'There is no list of prompts. Write {"prompts": ["first", "second"]}.',
  'error.jsonCount': '{prompts} prompts need {needed} switch frames, not {found}. Give one for every prompt but the first.',
  'error.frames': 'The switch frame "{text}" is not a whole number. Write for example 40, 80, 120.',
  'error.negative': 'A prompt cannot start at {time}. Use seconds from 0 on, or a whole latent frame.',
  'error.soft': 'A soft transition over {blocks} blocks has nothing between the prompts. Use at least 2 blocks, or keep.',
  'error.first': 'The first prompt starts at {time}, so nothing is said about the time before. Let it start at 0.',
  'error.same': 'Prompts {one} and {two} both start at {time}. Remove one of them, or change its time.',
  'error.order': 'Prompt {two} starts at {time}, before prompt {one}. Put the prompts in the order of their times.',

  'live.label': 'Live video',
  'live.picture': 'Video as it is made, frame {frame}', 'live.noPicture': 'No frame yet',
  'live.idle': 'Run the workflow: the video plays here while it is made.',
  'status.starting': 'starting', 'status.running': 'running', 'status.paused': 'paused', 'status.stopping': 'stopping',
  'status.done': 'done', 'status.failed': 'failed', 'status.idle': 'idle',
  'live.speed': 'Speed', 'live.speed.value': '{speed} frames/s',
  'live.speed.tip': 'Frames made a second, of the newest blocks; the video plays at {fps}',
  'live.buffer': 'Ahead', 'live.buffer.value': '{seconds} s',
  'live.buffer.tip': 'Seconds of video made ahead of real time since the first frame',
  'live.video': 'Video', 'live.video.value': '{seconds} s, block {block}', 'live.video.tip': '{frames} frames in the file',
  'live.memory': 'Memory', 'live.memory.value': '{memory}, cache {store}',
  'live.memory.tip': 'Of ComfyUI (or the GPU), and of it the keys and values kept',
  'live.window': 'Attends to', 'live.window.value': '{held} latent frames ({policy})', 'live.window.none': 'nothing yet',
  'live.window.tip': 'Latent frames that the memory holds, of all made so far',
  'live.prompt': 'Prompt of what comes next', 'live.prompt.tip': 'Ctrl+Enter sends it',
  'live.transition': 'Transition to the new prompt', 'live.blocks': 'Blocks that the soft transition takes',
  'live.send': 'Change prompt', 'live.seed': 'Seed', 'live.set': 'Set', 'live.seed.set': 'Set the seed of the coming blocks',
  'live.lora': 'LoRA', 'live.lora.named': 'LoRA {name}',
  'live.pause': 'Pause', 'live.resume': 'Resume', 'live.stop': 'Stop and keep',
  'live.stop.tip': 'Ends the video after this block and keeps the file',
  'live.log': 'What was changed, newest first', 'live.log.you': 'you',
  'live.log.line': 'block {block}: {what}, by {who}', 'live.log.plain': 'block {block}: {what}',
  'log.prompt': '{transition} to "{text}"', 'log.seed': 'seed {seed}', 'log.lora': 'LoRA {name} {strength}',
  'log.drive': 'holds {held}', 'log.pause': 'pause', 'log.resume': 'resume', 'log.stop': 'stop',
  'live.copy': 'Copy', 'live.copy.tip': 'Copy the log; the replay input of the node does the same again',
  'live.copied': 'The log is in the clipboard.', 'live.notCopied': 'The browser does not let this page copy.',
  'live.sent': 'Sent; acts from block {block} on.', 'live.saved': 'done: {file}',
  'pad.label': 'Steer the world', 'pad.hint': 'Click here, then arrow keys, WASD or a gamepad',
  'pad.focused': 'Arrow keys, WASD or a gamepad', 'pad.nothing': 'nothing',
  'pad.forward': 'Forward (up)', 'pad.back': 'Back (down)', 'pad.left': 'Left', 'pad.right': 'Right',
  'live.lost': 'The server does not answer ({reason}). Is ComfyUI still running?',
  'live.refused': 'The server refused it: {reason}'
}

const tables = { en }

/** The text `key` with {names} filled in. language: such as "de" or "de-CH". */
export function translate(key, values = {}, language = 'en') {
  const text = tables[language]?.[key] ?? tables[language.split('-')[0]]?.[key] ?? en[key] ?? key
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole))
}
