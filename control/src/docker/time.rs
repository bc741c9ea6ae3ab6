//! Times as the API writes them: RFC 3339 in UTC, with as many digits of the second's fraction as it has. And as filters
//! name them.

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::model::labels::duration_ns;

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

/// The moment that a filter names, ns since the epoch: by RFC 3339, by seconds since the epoch, or by how long before
/// `now_ns` it was.
pub(super) fn point_ns(text: &str, now_ns: u64) -> Option<u64> {
    let date = || u64::try_from(OffsetDateTime::parse(text, &Rfc3339).ok()?.unix_timestamp_nanos()).ok();
    let seconds = || text.parse::<u64>().ok()?.checked_mul(1_000_000_000);
    let before = || Some(now_ns.saturating_sub(duration_ns(text)?));
    date().or_else(seconds).or_else(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_name_a_moment_in_three_ways() {
        const DAY_NS: u64 = 24 * 3600 * 1_000_000_000;
        assert_eq!(point_ns("1970-01-02T00:00:00Z", 0), Some(DAY_NS));
        assert_eq!(point_ns("86400", 0), Some(DAY_NS));
        assert_eq!(point_ns("24h", 3 * DAY_NS), Some(2 * DAY_NS));
        for nonsense in ["", "yesterday", "-1", "1970-01-02", "1d"] {
            assert_eq!(point_ns(nonsense, 0), None, "{nonsense}");
        }
    }

    #[test]
    fn fractions_are_as_long_as_they_are() {
        assert_eq!(rfc3339(0), "0001-01-01T00:00:00Z");
        assert_eq!(rfc3339(1_700_000_000_000_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(rfc3339(1_700_000_000_120_000_000), "2023-11-14T22:13:20.12Z");
        assert_eq!(rfc3339(1_700_000_000_000_000_001), "2023-11-14T22:13:20.000000001Z");
    }
}
