//! A judge that needs no model and no network: which answer is easier to read.
//!
//! It measures exactly that, by a published formula, and nothing else: not whether an answer is true, helpful or complete.
//! It is of use where plain speech is what was trained, and to see the whole way from a run to a win rate.

use serde::Serialize;

use crate::statistics::Verdict;

/// What it measures, for a report.
pub const MEASURES: &str = "which answer is easier to read, by Flesch Reading Ease (English only); not whether it is true, \
                            helpful or complete";

/// Scores nearer than this are a tie: less than a syllable in eighty words.
const TIE: f64 = 1.0;

/// How easy a text is to read.
///
/// R. Flesch, *A new readability yardstick*, Journal of Applied Psychology 32 (1948); J. P. Kincaid, R. P. Fishburne,
/// R. L. Rogers and B. S. Chissom, *Derivation of new readability formulas*, Research Branch Report 8-75 (1975).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Readability {
    /// Sentences.
    pub sentences: usize,
    /// Words.
    pub words: usize,
    /// Syllables.
    pub syllables: usize,
}

impl Readability {
    /// Counts a text. None where it has no word, or where most of its letters are not of the Latin script, whose words the
    /// formulas know nothing about.
    ///
    /// A sentence ends with `.`, `!`, `?`, `…` or `:` before white space, and with a line break; dots before a small letter
    /// are those of an abbreviation or an omission. A word is a run of letters
    /// and digits with apostrophes in it; parts joined by hyphens are words of their own. A number is one word of one
    /// syllable. See [`syllables`].
    #[must_use]
    pub fn of(text: &str) -> Option<Self> {
        let letters = text.chars().filter(|c| c.is_alphabetic()).count();
        let latin = text.chars().filter(|c| c.is_alphabetic() && (*c as u32) < 0x250).count();
        let mut counted = Self { sentences: 0, words: 0, syllables: 0 };
        for sentence in sentences(text) {
            let before = counted.words;
            for word in words(sentence) {
                counted.words += 1;
                counted.syllables += syllables(word);
            }
            counted.sentences += usize::from(counted.words > before);
        }
        (counted.words > 0 && 2 * latin >= letters).then_some(counted)
    }

    /// Flesch Reading Ease, higher is easier; school books are about 60 to 70, legal texts below 30:
    ///
    /// ```text
    /// 206.835 − 1.015 words / sentences − 84.6 syllables / words
    /// ```
    #[must_use]
    pub fn reading_ease(&self) -> f64 {
        206.835 - 1.015 * self.words_a_sentence() - 84.6 * self.syllables_a_word()
    }

    /// Flesch–Kincaid grade, the years of school that it takes:
    ///
    /// ```text
    /// 0.39 words / sentences + 11.8 syllables / words − 15.59
    /// ```
    #[must_use]
    pub fn grade(&self) -> f64 {
        0.39 * self.words_a_sentence() + 11.8 * self.syllables_a_word() - 15.59
    }

    fn words_a_sentence(&self) -> f64 {
        self.words as f64 / self.sentences as f64
    }

    fn syllables_a_word(&self) -> f64 {
        self.syllables as f64 / self.words as f64
    }
}

/// Which of two answers is easier to read, with the scores. None where one of them cannot be scored, unless it is empty: an
/// empty answer is worse than any other.
#[must_use]
pub fn compare(a: &str, b: &str) -> Option<(Verdict, String)> {
    match (a.trim().is_empty(), b.trim().is_empty()) {
        (true, true) => return Some((Verdict::Tie, "both are empty".into())),
        (true, false) => return Some((Verdict::B, "A is empty".into())),
        (false, true) => return Some((Verdict::A, "B is empty".into())),
        (false, false) => {}
    }
    let (one, two) = (Readability::of(a)?, Readability::of(b)?);
    let (ease, other) = (one.reading_ease(), two.reading_ease());
    let verdict = match ease - other {
        near if near.abs() < TIE => Verdict::Tie,
        lead if lead > 0.0 => Verdict::A,
        _ => Verdict::B,
    };
    let reason = format!(
        "A {ease:.1} (grade {:.1}), B {other:.1} (grade {:.1}) by Flesch Reading Ease",
        one.grade(),
        two.grade()
    );
    Some((verdict, reason))
}

/// Texts between the ends of sentences.
fn sentences(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| {
        let mut rest = line;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let mut after = rest.char_indices().peekable();
            let mut end = rest.len();
            while let Some((_, c)) = after.next() {
                if !matches!(c, '.' | '!' | '?' | '…' | ':') {
                    continue;
                }
                // closing quotes and brackets belong to the sentence
                while after
                    .peek()
                    .is_some_and(|(_, c)| matches!(c, '.' | '!' | '?' | '"' | '\'' | ')' | ']' | '”' | '’'))
                {
                    after.next();
                }
                let Some(&(at, next)) = after.peek() else { break };
                let goes_on = matches!(c, '.' | '…') && rest[at..].trim_start().starts_with(char::is_lowercase);
                if next.is_whitespace() && !goes_on {
                    end = at;
                    break;
                }
            }
            let (sentence, left) = rest.split_at(end);
            rest = left.trim_start();
            Some(sentence)
        })
    })
}

fn words(sentence: &str) -> impl Iterator<Item = &str> {
    // a comma or point between digits is part of a number
    let is_part = move |(at, c): (usize, char)| {
        let neighbours_are_digits = || {
            let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
            digit(sentence[..at].chars().next_back()) && digit(sentence[at + c.len_utf8()..].chars().next())
        };
        c.is_alphanumeric() || matches!(c, '\'' | '’') || (matches!(c, '.' | ',') && neighbours_are_digits())
    };
    let mut at = 0;
    let next = move || {
        let rest = &sentence[at..];
        let mut chars = rest.char_indices().map(|(i, c)| (at + i, c));
        let start = chars.by_ref().find(|&place| is_part(place))?.0;
        let end = chars.find(|&place| !is_part(place)).map_or(sentence.len(), |(end, _)| end);
        at = end;
        Some(&sentence[start..end])
    };
    std::iter::from_fn(next).filter(|word| word.chars().any(char::is_alphanumeric))
}

/// Syllables of an English word: groups of vowels (`a e i o u`, and `y` behind the first letter), at least one, where
///
/// - a final `e` is silent, but in `-le` after a consonant (ta-ble); so are the `e` of `-es`, but after a hissing sound
///   (hous-es) or such an `l`, and of `-ed`, but after `t` or `d` (want-ed);
/// - `e` is silent before the endings `-ly`, `-ful`, `-ness`, `-less` and `-ment`;
/// - two vowels that are spoken apart count twice: `ia` (but after `c` and `t`, and in `-lian`), `io` (but in `-tion`,
///   `-sion`, `-gion`, `-lion`), `iu`, `eo` (but in `-geon`, `people`), `ua` and `ue` within a word, `ying`, `oing`, and
///   `-ism` has a second one without a vowel.
///
/// A word without a letter is one.
#[must_use]
pub fn syllables(word: &str) -> usize {
    let word: String = word.to_lowercase().chars().filter_map(plain).collect();
    let letters = word.as_bytes();
    let vowel = |i: usize| match letters.get(i) {
        Some(b'a' | b'e' | b'i' | b'o' | b'u') => true,
        // a consonant at the start, and between vowels (be-yond, play-er)
        Some(b'y') => i > 0 && !letters.get(i + 1).is_some_and(|next| b"aeou".contains(next)),
        _ => false,
    };
    let groups = (0..letters.len()).filter(|&i| vowel(i) && (i == 0 || !vowel(i - 1))).count();
    let mut count = groups as isize;
    let n = letters.len();
    let is_before = |i: usize| i > 0 && vowel(i - 1);
    let ends = |end: &str| word.ends_with(end) && n > end.len();
    let consonant_l = |l: usize| l > 0 && letters[l] == b'l' && !vowel(l - 1);
    // silent e
    if n > 2 && letters[n - 1] == b'e' && !is_before(n - 1) && !consonant_l(n - 2) {
        count -= 1;
    } else if n > 3 && ends("es") && !is_before(n - 2) {
        let hisses = matches!(letters[n - 3], b's' | b'x' | b'z' | b'c' | b'g') || ends("ches") || ends("shes");
        count -= isize::from(!hisses && !consonant_l(n - 3));
    } else if n > 3 && ends("ed") && !is_before(n - 2) && !matches!(letters[n - 3], b't' | b'd') {
        count -= isize::from(!consonant_l(n - 3) || n > 4);
    }
    for ending in ["ely", "eful", "eness", "eless", "ement"] {
        // not of `element`, whose first e is spoken too
        let silent = ends(ending) && n > ending.len() + 1 && !vowel(n - ending.len() - 1);
        count -= isize::from(silent && !consonant_l(n - ending.len() - 1) && word != "element");
    }
    // spoken apart
    for (i, pair) in letters.windows(2).enumerate() {
        let (before, rest) = (i.checked_sub(1).map(|i| letters[i]), &word[i..]);
        let apart = match pair {
            b"ia" => !matches!((before, rest), (Some(b'c' | b't' | b'g'), _) | (Some(b'l'), "ian")),
            b"io" => {
                !matches!((before, rest), (Some(b't' | b's' | b'g' | b'c' | b'x'), _) | (Some(b'l'), "ion" | "ions"))
                    || word == "lion"
                    || word == "lions"
            }
            b"iu" | b"ii" => true,
            b"eo" => before != Some(b'g') && before != Some(b'p') && rest != "eous",
            b"ua" => !matches!(before, Some(b'q' | b'g' | b's')),
            b"ue" => !matches!(before, Some(b'q' | b'g')) && i + 2 < n && rest != "ues" && rest != "ued",
            b"yi" | b"oi" if rest == "ying" || rest == "oing" => pair == b"oi" || vowel(i),
            b"ei" => rest == "eing",
            b"ie" => matches!(rest, "iet" | "ience" | "ient" | "iety") && !matches!(before, Some(b'c' | b't')),
            _ => false,
        };
        count += isize::from(apart);
    }
    count += isize::from(ends("sm"));
    count.max(1) as usize
}

/// A letter without its accent; nothing for what is no letter.
fn plain(c: char) -> Option<char> {
    Some(match c {
        'à' | 'á' | 'â' | 'ã' | 'ä' | 'å' => 'a',
        'è' | 'é' | 'ê' | 'ë' => 'e',
        'ì' | 'í' | 'î' | 'ï' => 'i',
        'ò' | 'ó' | 'ô' | 'õ' | 'ö' | 'ø' => 'o',
        'ù' | 'ú' | 'û' | 'ü' => 'u',
        'ç' => 'c',
        'ñ' => 'n',
        c if c.is_ascii_lowercase() => c,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sentences with published scores, those of the Flesch–Kincaid article of Wikipedia and of implementations that test
    /// themselves by it.
    #[test]
    fn published_scores() {
        let counted = |text| {
            let counted = Readability::of(text).expect("words");
            ([counted.sentences, counted.words, counted.syllables], counted.reading_ease(), counted.grade())
        };
        let (counts, ease, grade) = counted("The cat sat on the mat.");
        assert_eq!(counts, [1, 6, 6]);
        assert!((ease - 116.145).abs() < 1e-9 && (grade + 1.45).abs() < 1e-9, "{ease} {grade}");
        let (counts, ease, grade) =
            counted("This sentence, taken as a reading passage unto itself, is being used to prove a point.");
        assert_eq!(counts, [1, 16, 23]);
        assert!((ease - 68.9825).abs() < 1e-9 && (grade - 7.6125).abs() < 1e-9, "{ease} {grade}");
        let (counts, ease, _) =
            counted("The Australian platypus is seemingly a hybrid of a mammal and reptilian creature.");
        assert_eq!(counts, [1, 13, 24]);
        assert!((ease - 37.455).abs() < 0.05, "{ease}");
    }

    /// Held to the CMU Pronouncing Dictionary, on words of the quickstart's answers (`scripts/make_syllable_fixtures.py`).
    #[test]
    fn syllables_of_a_dictionary() {
        let text = include_str!("../../tests/fixtures/syllables.json");
        let words: std::collections::BTreeMap<String, (usize, Vec<usize>)> =
            serde_json::from_str(text).expect("JSON");
        let (mut all, mut right, mut excess) = (0, 0, 0.0);
        for (word, (times, known)) in &words {
            let counted = syllables(word);
            let nearest = known.iter().min_by_key(|known| known.abs_diff(counted)).expect("one");
            all += times;
            right += if counted == *nearest { *times } else { 0 };
            excess += *times as f64 * (counted as f64 - *nearest as f64);
        }
        let (right, excess) = (right as f64 / all as f64, excess / all as f64);
        // measured: 98.5 % of all words there; a rule that is wrong costs several per cent
        assert!(right > 0.97, "{right} of the words are counted right");
        // a hundredth of a syllable a word is less than a point of reading ease
        assert!(excess.abs() < 0.01, "{excess} syllables a word too many");
    }

    #[test]
    fn sentences_and_words() {
        let counted = |text| Readability::of(text).map(|counted| [counted.sentences, counted.words]);
        assert_eq!(counted("One two. Three? \"Four!\" Five"), Some([4, 5]));
        assert_eq!(counted("It is 3.5 m, or 1,000 ft... long."), Some([1, 8]));
        assert_eq!(counted("- a list\n- of well-known things\n\n"), Some([2, 6]));
        assert_eq!(counted("Don't."), Some([1, 1]));
        for nothing in ["", " \n", "... - !", "это не английский текст, a bit"] {
            assert_eq!(counted(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn the_easier_answer_wins_in_either_place() {
        let (plain, jargon) = ("Rain is water that falls.", "Precipitation constitutes gravitational condensation.");
        assert_eq!(compare(plain, jargon).map(|(verdict, _)| verdict), Some(Verdict::A));
        assert_eq!(compare(jargon, plain).map(|(verdict, _)| verdict), Some(Verdict::B));
        assert_eq!(compare(plain, plain).map(|(verdict, _)| verdict), Some(Verdict::Tie));
        assert_eq!(compare("", jargon).map(|(verdict, _)| verdict), Some(Verdict::B));
        assert_eq!(compare("123 !!", "это текст"), None);
    }
}
