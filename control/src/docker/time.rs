//! Times as the API writes them: RFC 3339 in UTC, with as many digits of the second's fraction as it has.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What Go writes for a time that was never set.
const ZERO: &str = "0001-01-01T00:00:00Z";

/// `ns` since the epoch; 0 is "never".
pub(super) fn rfc3339(ns: u64) -> String {
    if ns == 0 {
        return ZERO.to_owned();
    }
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ns))
        .ok()
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| ZERO.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_as_long_as_they_are() {
        assert_eq!(rfc3339(0), "0001-01-01T00:00:00Z");
        assert_eq!(rfc3339(1_700_000_000_000_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(rfc3339(1_700_000_000_120_000_000), "2023-11-14T22:13:20.12Z");
        assert_eq!(rfc3339(1_700_000_000_000_000_001), "2023-11-14T22:13:20.000000001Z");
    }
}
