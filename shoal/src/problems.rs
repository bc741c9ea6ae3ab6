//! What the agent logs as a warning or as an error is what went wrong: the last of it is told to the managers.

use std::error::Error;
use std::fmt::{self, Write as _};

use mesh_agent::Health;
use mesh_api::error::chain;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Notes warnings and errors.
pub(crate) struct Problems(pub(crate) Health);

impl<S: Subscriber> Layer<S> for Problems {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() <= Level::WARN {
            let mut line = Line::default();
            event.record(&mut line);
            self.0.note_problem(&line.text());
        }
    }
}

/// An event on one line, as the log has it.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn text(&self) -> String {
        format!("{}{}", self.message, self.fields)
    }

    fn note(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        // A string takes what it is given.
        let _ = match field.name() {
            "message" => self.message.write_fmt(value),
            name => write!(self.fields, " {name}={value}"),
        };
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.note(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.note(field, format_args!("{value}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.note(field, format_args!("{}", chain(value)));
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn the_last_warning_or_error_is_noted_with_its_fields() {
        let health = Health::default();
        let log = tracing_subscriber::registry().with(Problems(health.clone()));
        tracing::subscriber::with_default(log, || {
            tracing::info!("all is well");
            assert_eq!(health.last_problem(), None);
            tracing::error!("lost");
            let error = mesh_api::codec::CodecError::Io(std::io::Error::other("cable"));
            let reason = format!("link {}", 7);
            tracing::warn!(error = &error as &dyn Error, %reason, count = 3, "the session is broken");
            tracing::debug!("goes on");
        });
        let expected = "the session is broken error=the session's stream failed: cable reason=link 7 count=3";
        assert_eq!(health.last_problem().as_deref(), Some(expected));
    }
}
