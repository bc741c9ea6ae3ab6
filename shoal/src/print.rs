//! Printing for people: tables, times, sizes; to a reader who may leave at any time.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Prints a text and a line's end; `false` where nobody reads any more.
pub(crate) fn line(text: &str) -> io::Result<bool> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true),
    }
}

/// Rows under their titles, each column as wide as its widest cell.
pub(crate) fn table<const N: usize>(titles: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = titles.map(|title| title.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let titles = titles.map(str::to_owned);
    let rows = [&titles].into_iter().chain(rows);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.map(line).collect::<Vec<_>>().join("\n")
}

/// An agent's answer in JSON, on as many lines as it takes.
pub(crate) fn json(answer: &[u8]) -> Result<String> {
    let value: Value = serde_json::from_slice(answer).context("the agent's answer does not decode")?;
    Ok(serde_json::to_string_pretty(&value)?)
}

/// A time in UTC, to the millisecond.
pub(crate) fn time(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    let (hour, minute, second, ms) = time.time().as_hms_milli();
    format!("{}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z", time.date())
}

/// A time as the agent's API writes it (RFC 3339).
pub(crate) fn parsed(text: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(SystemTime::from)
}

/// A duration in its largest unit.
pub(crate) fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        0 => format!("{} ms", duration.as_millis()),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// A number of bytes, in the unit that leaves it short.
#[expect(clippy::cast_precision_loss, reason = "to one digit")]
pub(crate) fn bytes(bytes: u64) -> String {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    match bytes {
        0..KIB => format!("{bytes} B"),
        KIB..MIB => format!("{:.1} KiB", bytes as f64 / KIB as f64),
        _ => format!("{:.1} MiB", bytes as f64 / MIB as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a".to_owned(), "long cell".to_owned()], ["longer".to_owned(), String::new()]];
        assert_eq!(table(["ONE", "TWO"], &rows), "ONE     TWO\na       long cell\nlonger");
    }

    #[test]
    fn durations_and_sizes_are_short() {
        let told = [0, 1_500, 119_000, 120_000, 7_200_000, 172_800_000]
            .map(|ms| duration(Duration::from_millis(ms)));
        assert_eq!(told, ["0 ms", "1 s", "119 s", "2 min", "2 h", "2 d"]);
        assert_eq!([1023, 1536, 3 << 20].map(bytes), ["1023 B", "1.5 KiB", "3.0 MiB"]);
    }

    #[test]
    fn times_are_in_utc_to_the_millisecond() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(86_400_000_000 + 12_345);
        assert_eq!(time(at), "1970-01-02T00:00:00.012Z");
        assert_eq!(parsed("1970-01-02T00:00:00.012345Z"), Some(at));
        assert_eq!(parsed("yesterday"), None);
    }
}
