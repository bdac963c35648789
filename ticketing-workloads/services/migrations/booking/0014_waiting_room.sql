-- The waiting room: one row, so that all gateways have one order of arrival, which outlives each of them. `state` is what
-- `waiting_room/decision.rs` writes; a change is written only over the version that it was made from. `epoch`: numbers of
-- another database, or of this one before it was restored, mean nothing here.
CREATE TABLE waiting_room (
    id      smallint PRIMARY KEY CHECK (id = 1),
    epoch   uuid NOT NULL DEFAULT gen_random_uuid(),
    version bigint NOT NULL DEFAULT 0,
    state   jsonb NOT NULL DEFAULT '{}'
) WITH (fillfactor = 10);

INSERT INTO waiting_room (id) VALUES (1);
