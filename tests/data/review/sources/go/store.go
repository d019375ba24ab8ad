package agent

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"
)

// ErrNotFound means that no build has the id.
var ErrNotFound = errors.New("agent: no such build")

// Build is a row of the table builds.
type Build struct {
	ID       int64
	Host     string
	Branch   string
	State    string
	Started  time.Time
	Finished sql.NullTime
}

// Store keeps builds in an SQL database.
type Store struct {
	db *sql.DB
}

// NewStore uses db, which the caller closes.
func NewStore(db *sql.DB) *Store {
	return &Store{db: db}
}

// Get returns one build, or ErrNotFound.
func (s *Store) Get(ctx context.Context, id int64) (*Build, error) {
	var b Build
	err := s.db.QueryRowContext(ctx,
		"SELECT id, host, branch, state, started, finished FROM builds WHERE id = $1", id,
	).Scan(&b.ID, &b.Host, &b.Branch, &b.State, &b.Started, &b.Finished)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("reading build %d: %w", id, err)
	}
	return &b, nil
}

// ByBranch returns the newest builds of a branch.
func (s *Store) ByBranch(ctx context.Context, branch string, limit int) ([]Build, error) {
	rows, err := s.db.QueryContext(ctx,
		"SELECT id, host, branch, state, started, finished FROM builds"+
			" WHERE branch = $1 ORDER BY started DESC LIMIT $2", branch, limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var builds []Build
	for rows.Next() {
		var b Build
		if err := rows.Scan(&b.ID, &b.Host, &b.Branch, &b.State, &b.Started, &b.Finished); err != nil {
			return nil, err
		}
		builds = append(builds, b)
	}
	return builds, rows.Err()
}

// Finish sets the final state of a running build, and counts it for its host, both or neither.
func (s *Store) Finish(ctx context.Context, id int64, state string, at time.Time) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // does nothing after Commit
	var host string
	err = tx.QueryRowContext(ctx,
		"UPDATE builds SET state = $1, finished = $2 WHERE id = $3 AND state = 'running' RETURNING host",
		state, at, id,
	).Scan(&host)
	if errors.Is(err, sql.ErrNoRows) {
		return ErrNotFound
	}
	if err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx,
		"UPDATE hosts SET builds = builds + 1 WHERE name = $1", host,
	); err != nil {
		return err
	}
	return tx.Commit()
}
