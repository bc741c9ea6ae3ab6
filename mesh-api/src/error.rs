//! Errors for people: libraries leave an error's source out of its text, so that whoever shows it says each part once.

use std::error::Error;

/// An error and what it came from, on one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use crate::codec::CodecError;

    #[test]
    fn a_chain_names_every_source_once() {
        let error = CodecError::Io(std::io::Error::other("cable"));
        assert_eq!(super::chain(&error), "the session's stream failed: cable");
    }
}
