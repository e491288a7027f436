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
accurate accurately adjective adjectives adverb adverbs aim ambiguous analyse analyses analysis analyze answer
answered answering answers applies apply appropriate aspect aspects assess assign assigned assigns attention attitude
author authors belong belonging belongs broad categories categorise categorize category cause choice choices class
classes classification classified classifier classifies classify classifying clause clauses clear clearer clearly clue
clues comment comments complaint complaints conclude concludes conclusion context contexts contrast convey conveyed
conveying conveys count criticise criticism cue cues decision define defined definition determine determined
determines determining direct distinguish domain dominant emotion emotional emotions emphasis entails evaluate
evaluated evaluating evaluation event events evidence example examples express expressed expresses expressing
expression expressions fact facts factual favourable feeling feelings field fields figurative genre hidden identified
identifies identify identifying identity implicit implicitly implied implies imply infer information input instruction
instructions intensity intent intention interpret interpretation ironic irony judge judged judgement judges judging
judgment key keyword keywords label labeled labeling labelled labelling labels language line lines list literal
literally message messages mind mistake mistakes model models mood natural nature negation negations negative neutral
noun nouns nuance nuances opinion opinions option options output overlook passage passages pattern patterns phrase
phrases phrasing pick polarity positive precise precisely predict prefer present primarily primary prompt purpose
recognise recognize refer reference references refers reflect reflected reflects reply represent respond response
responses return review reviewer reviews role sarcasm sarcastic select selected selecting sentence sentences sentiment
sentiments sincere situation source stance statement statements step steps structure style subject subjective subjects
subtle summarise summarize summary target task tasks term terms text texts title titles tone tones topic topics typo
typos understanding user verb verbs view views vocabulary weigh weighing
"""

COMMON_WORDS = frozenset(f"{_FUNCTION_WORDS} {_OF_INSTRUCTIONS}".split())
