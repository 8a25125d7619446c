//! Stop strings in a stream of text.

use crate::{Error, Result};

/// Ends a text at the first stop string, however the text is cut into pieces.
///
/// The stop string that is *complete* first wins (of two that end together, the longer): this needs
/// no look ahead, and the result is the same wherever the text is cut. What might become a stop
/// string is held back until it is decided; nothing of a stop string is ever given out.
///
/// ```
/// # fn main() -> candle_mmfp4::Result<()> {
/// use candle_mmfp4::generation::StopStrings;
///
/// let mut stop = StopStrings::new(vec!["\nUser:".into()])?;
/// assert_eq!(stop.push("Fine.\nUs").emit, "Fine.");
/// assert_eq!(stop.push("ed to it").emit, "\nUsed to it");
/// assert!(stop.push("\nUser: more").stopped);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

/// What one piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopProgress {
    /// Text that certainly comes before any stop string.
    pub emit: String,
    /// Whether a stop string has come; all later text is dropped.
    pub stopped: bool,
}

impl StopStrings {
    /// Takes the stop strings; with none, all text passes at once.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty string, which would stop before anything is said.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::argument(
                "StopStrings::new",
                "stops",
                "strings of at least one character",
                "an empty string",
            ));
        }
        Ok(Self {
            stops,
            held: String::new(),
            stopped: false,
        })
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> StopProgress {
        if self.stopped {
            return self.progress(String::new());
        }
        self.held.push_str(text);
        let found = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)))
            .min();
        let emit = match found {
            Some((_, start)) => {
                self.stopped = true;
                let mut emit = std::mem::take(&mut self.held);
                emit.truncate(start);
                emit
            }
            None => {
                let undecided = self.held.split_off(self.held.len() - self.undecided());
                std::mem::replace(&mut self.held, undecided)
            }
        };
        self.progress(emit)
    }

    /// Ends the text: what was held back, if no stop string has come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    fn progress(&self, emit: String) -> StopProgress {
        StopProgress {
            emit,
            stopped: self.stopped,
        }
    }

    /// The length of the longest end of the held text that begins a stop string.
    fn undecided(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        self.held
            .char_indices()
            .map(|(start, _)| &self.held[start..])
            .find(|end| end.len() < longest && self.stops.iter().any(|stop| stop.starts_with(end)))
            .map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// The text up to the stop string that is complete first, by looking at every prefix.
    fn reference(text: &str, stops: &[String]) -> (String, bool) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let longest = stops
                .iter()
                .filter(|stop| text[..end].ends_with(*stop))
                .max_by_key(|stop| stop.len());
            if let Some(stop) = longest {
                return (text[..end - stop.len()].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn any_cut_gives_the_whole_string_search() {
        let mut random = Random::new(3);
        let alphabet = ['a', 'b', 'é', '🦀'];
        let mut word = |most: usize| -> String {
            let length = 1 + random.below(most);
            (0..length).map(|_| alphabet[random.below(4)]).collect()
        };
        let cases: Vec<(String, Vec<String>)> = (0..3000)
            .map(|round| (word(24), (0..round % 4).map(|_| word(4)).collect()))
            .collect();
        let mut stops_seen = 0;
        for (text, stops) in cases {
            let (expected, stopped) = reference(&text, &stops);
            stops_seen += usize::from(stopped);
            for _ in 0..4 {
                let mut stop = StopStrings::new(stops.clone()).unwrap();
                let (mut emitted, mut piece) = (String::new(), String::new());
                let mut last = false;
                for c in text.chars() {
                    piece.push(c);
                    if random.below(3) == 0 {
                        let progress = stop.push(&std::mem::take(&mut piece));
                        emitted.push_str(&progress.emit);
                        last = progress.stopped;
                        assert!(expected.starts_with(&emitted), "{text} {stops:?} {emitted}");
                    }
                }
                let progress = stop.push(&piece);
                emitted.push_str(&progress.emit);
                emitted.push_str(&stop.finish());
                assert_eq!(
                    (emitted.as_str(), progress.stopped || last),
                    (expected.as_str(), stopped),
                    "{text} {stops:?}"
                );
            }
        }
        assert!(stops_seen > 500);
    }

    #[test]
    fn nothing_is_held_that_cannot_become_a_stop() {
        let mut stop = StopStrings::new(vec!["</s>".into()]).unwrap();
        assert_eq!(stop.push("a < b").emit, "a < b");
        assert_eq!(stop.push(" </").emit, " ");
        assert_eq!(stop.push("p>").emit, "</p>");
        assert_eq!(stop.push("x</s").emit, "x");
        assert_eq!(stop.finish(), "</s");
    }

    #[test]
    fn empty_strings_are_refused_and_none_is_fine() {
        assert!(matches!(
            StopStrings::new(vec!["".into()]),
            Err(Error::Argument { .. })
        ));
        let mut none = StopStrings::new(vec![]).unwrap();
        assert_eq!(
            none.push("all of it"),
            StopProgress {
                emit: "all of it".into(),
                stopped: false
            }
        );
    }
}
