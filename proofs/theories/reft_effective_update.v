(** ReFT at mlp_out is a low-rank update of W_d plus a bias

    LoReFT replaces y by y + R^T (W y + b - R y), with y = W_d m + b_d the MLP output.

    Claims, exact and for any m:
      - R^T (W y + b - R y) = dW_d m + R^T b + R^T (W - R) b_d,
        dW_d = R^T (W - R) W_d, rank(dW_d) <= r; every shift lies in col(R^T).
      - If R has orthonormal rows, the steered output has R-coordinates W y + b and
        agrees with y orthogonally to the rows of R.
      - More generally, the linear steers at mlp_out of rank at most r are exactly the
        updates dW_d of rank at most r whose rows lie in the row space of W_d.

    Assumptions.  Any field; orthonormality only where it is named.

    Not said here.  The equivalence is at mlp_out as written to the residual stream;
    a norm after the MLP breaks it. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Section Reft.
Variables (F : fieldType) (d n r : nat).
Variables (R W : 'M[F]_(r, d)) (b : 'cV[F]_r).
Variables (Wd : 'M[F]_(d, n)) (bd : 'cV[F]_d).

(** The shift of LoReFT: R^T (W y + b - R y). *)
Definition reft (y : 'cV[F]_d) : 'cV[F]_d := R^T *m (W *m y + b - R *m y).

(** The update it amounts to: dW_d = R^T (W - R) W_d. *)
Definition reft_update : 'M[F]_(d, n) := R^T *m (W - R) *m Wd.

(** The bias it amounts to: R^T b + R^T (W - R) b_d. *)
Definition reft_bias : 'cV[F]_d := R^T *m b + R^T *m (W - R) *m bd.

(** reft(y) = R^T (W - R) y + R^T b *)
Lemma reftE y : reft y = R^T *m (W - R) *m y + R^T *m b.
Proof. by rewrite /reft addrAC -mulmxBl mulmxDr mulmxA. Qed.

(** Steered output = output with updated weights and bias. *)
Theorem reft_is_update (m : 'cV_n) :
  let y := Wd *m m + bd in
  y + reft y = (Wd + reft_update) *m m + (bd + reft_bias).
Proof.
rewrite /= reftE /reft_update /reft_bias (mulmxDr (R^T *m _)) (mulmxDl Wd) mulmxA.
move: (_ *m Wd *m m) (_ *m bd) => y1 y2.
by rewrite -(addrA y1) addrACA (addrC y2).
Qed.

(** rank(dW_d) <= r *)
Theorem reft_rank : (\rank reft_update <= r)%N.
Proof.
rewrite /reft_update -mulmxA (leq_trans (mxrankM_maxl _ _)) //.
exact: rank_leq_col.
Qed.

(** Every shift lies in the span of the rows of R. *)
Theorem reft_shift_in_span y : in_colspan (reft y) R^T.
Proof. by apply/colspanP; eexists. Qed.

Hypothesis R_orth : R *m R^T = 1%:M.

(** R R^T = 1: the coordinates along R become W y + b. *)
Theorem reft_replaces y : R *m (y + reft y) = W *m y + b.
Proof.
by rewrite mulmxDr /reft mulmxA R_orth mul1mx addrCA subrr addr0.
Qed.

(** R R^T = 1: everything orthogonal to the rows of R is left alone. *)
Theorem reft_keeps_rest y :
  (1%:M - R^T *m R) *m (y + reft y) = (1%:M - R^T *m R) *m y.
Proof.
rewrite mulmxDr; apply/eqP; rewrite -subr_eq0 addrAC subrr add0r /reft mulmxA.
by rewrite mulmxBl mul1mx -mulmxA R_orth mulmx1 subrr mul0mx.
Qed.
End Reft.

Section Reach.
Variables (F : fieldType) (d n : nat).
Implicit Types (Wd dWd : 'M[F]_(d, n)) (S : 'M[F]_d).

(** Some S of rank <= r has S W_d m = dW_d m for all m, exactly when rank(dW_d) <= r
    and the rows of dW_d lie in the row space of W_d. *)
Theorem steer_reaches_update r Wd dWd :
  (exists S, (\rank S <= r)%N /\ forall m : 'cV_n, S *m (Wd *m m) = dWd *m m)
    <-> (\rank dWd <= r)%N /\ (dWd <= Wd)%MS.
Proof.
split=> [[S [Sr E]]|[dr /mulmxKpV E]]; last first.
  exists (dWd *m pinvmx Wd); split=> [|m]; last by rewrite mulmxA E.
  exact: leq_trans (mxrankM_maxl _ _) dr.
have <- : S *m Wd = dWd by apply: mulmx_inj => m; rewrite -mulmxA.
by rewrite submxMl (leq_trans (mxrankM_maxl _ _)).
Qed.
End Reach.
