"""Words that tell nothing of a client: function words, and those that instructions for labelling texts are made of.

The leak gate lets a word through that is here, in whatever texts it stands besides. Left out on purpose: what is a
first name too (mark, grant, faith, rich), numbers, places, months, days, trades and products. A word that is
missing costs a rewrite now and then; one too many could be somebody's name. English only: for another language the
gate knows the prompt's own words and those of the public texts, and is the stricter for it.
"""

from __future__ import annotations

_FUNCTION_WORDS = """
a about above across act acts actual actually add added adds after again against all almost alone along already also
although always am among an and another any anybody anyone anything apart are arent around as aside ask asked asking
asks at away b back base based basic basis be became because become becomes been before begin begins behind being
below beside besides best better between beyond both but by can cannot cant careful carefully carries carry case cases
certain certainly change changes choose chooses choosing chosen close closely come comes coming common compare
compared comparing concerning consider considered considering considers contain contained containing contains correct
correctly could couldnt d decide decided decides deciding describe described describes describing detail detailed
details did didnt differ difference differences different differently directly do does doesnt doing done dont down due
during e each easily easy either else end ends enough entire entirely especially etc even evenly ever every everybody
everyone everything exact exactly except expect expected explain explained explaining explains explicit explicitly
extra far few fewer find finding finds first fit fits focus focused focusing follow followed following follows for
form forms found four free from full fully further g gave general generally get gets getting give given gives giving
go goes going gone good great group groups had half hard has hasnt have havent having he help helpful helps hence her
here hers him his how however i idea ideas if important improve in include included includes including indeed indicate
indicated indicates indicating indication indicator indicators instead into is isnt it its itself just keep keeping
keeps kind kinds know knowing known knows large last late later lead leads least leave leaves left less let lets like
likely little ll long longer look looking looks low lower m made main mainly make makes making many matter matters me
mean meaning meanings means meant mention mentioned mentions mere merely might mixed more most mostly much must my
myself near nearly necessarily necessary need needed needs neither never new next no nobody none nor not note noted
notes nothing now obvious obviously of off often on once one ones only onto open or order other others otherwise our
out outside over overall own part particular particularly parts pay people per perhaps person piece place plain
plainly point points possible possibly probable probably provide provided provides put question questions quite rather
re read reader reading reads real really reason reasons related relevant remain remains result results right rule
rules s said same say saying says second see seeing seem seems seen sense separate set sets several shall she short
should shouldnt show showing shown shows side similar simple simply since single small so some somebody someone
something sometimes somewhat soon sort sorts speak speaks specific specifically start starts state stated states still
stop straight strong strongly such suggest suggested suggests sure t take taken takes taking talk talks tell telling
tells tend than that thats the their them themselves then there therefore these they thing things think this those
though three through thus to together too toward towards treat true truly try trying turn two type types typical
typically unclear under understand unless unlike until up upon us use used useful uses using usual usually various ve
very vs want wants was wasnt way ways we weak well went were werent what whatever when whenever where whereas whether
which while who whole whom whose why will with within without word worded wording words work works would wouldnt write
writer writes writing written wrong yes yet you your yourself
"""

_OF_INSTRUCTIONS = """
abbreviation abbreviations accurate accurately adjective adjectives adverb adverbs advice agree agrees aim ambiguous
analyse analyses analysis analyze anger angry annoyance annoyed answer answered answering answers applies apply
appropriate approval article articles aspect aspects assess assign assigned assigns attention attitude author authors
balance balanced belong belonging belongs blame broad capital categories categorise categorize category cause choice
choices class classes classification classified classifier classifies classify classifying clause clauses clear
clearer clearly clue clues colloquial comment comments complaint complaints conclude concludes conclusion conclusions
confusion content context contexts contradict contradicts contrast convey conveyed conveying conveys count criticise
criticises criticism cue cues customer customers decision define defined definition dependent determine determined
determines determining direct disagree disagreement disappointed disappointing disappointment disapproval dislike
dislikes displeasure dissatisfaction dissatisfied distinguish domain dominant emoji emojis emoticon emoticons emotion
emotional emotions emphasis entails enthusiasm enthusiastic evaluate evaluated evaluating evaluation event events
evidence exaggerate exaggeration example examples excited excitement exclamation experience experiences express
expressed expresses expressing expression expressions extreme extremely fact facts factual favourable feel feeling
feelings feels field fields figurative formal frustrated frustration genre grammar gratitude greatest happiness happy
hashtag hashtags hate hates headline headlines hidden humor humour hyperbole identified identifies identify
identifying identity idiom idioms ignore ignored ignoring implicit implicitly implied implies imply individual infer
inferred informal information input instruction instructions intensity intent intention interpret interpretation
ironic irony joke jokes joyful judge judged judgement judges judging judgment key keyword keywords label labeled
labeling labelled labelling labels language line lines list literal literally love loves message messages metaphor
metaphors mild mildly mind misleading mistake mistakes mix mixes mixture model models moderately mood natural nature
negation negations negative neutral news noun nouns nuance nuances objective objectively opinion opinions option
options outcome output overlook overly paragraph paragraphs passage passages pattern patterns phrase phrases phrasing
pick pleasant pleased pleasure polarity positive praise praised praises praising precise precisely predict prefer
present primarily primary prompt punctuation purpose quote quoted quotes rating ratings recognise recognize recommend
recommendation recommendations recommended recommends refer reference references refers reflect reflected reflects
reject relies rely reply report reported reports represent respond response responses return review reviewer reviews
rhetorical role sad sadness sarcasm sarcastic satisfaction satisfied select selected selecting sentence sentences
sentiment sentiments sincere situation slang source spelling stance statement statements step steps strength stronger
strongest structure style subject subjective subjects subtle suggestion suggestions summarise summarize summary
surprise surprised target task tasks tendency term terms text texts theme themes thorough thoroughly title titles tone
tones topic topics typo typos understanding unhappy unpleasant upset urgency user value values verb verbs view views
vocabulary warn warning warns watch weaker weigh weighing weight weights worried worry worse worst
"""

COMMON_WORDS = frozenset(f"{_FUNCTION_WORDS} {_OF_INSTRUCTIONS}".split())
