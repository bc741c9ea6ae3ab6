//! What a member keeps, and what several of them do together.

mod disk;
mod fixture;
mod history;
mod members;
mod net;
mod platter;
mod power;
mod simulation;
mod stream;
mod suite;
mod sys;
