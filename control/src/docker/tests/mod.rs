//! The API over a host that is not there: its routes in tables of cases, and the real `docker` command line.

mod attachments;
mod attacks;
mod autolock;
mod backup;
mod ca;
mod cli;
mod docker;
mod host;
mod networks;
mod refusals;
mod shapes;
mod status;
mod tokens;
mod watch;
