(** The first-order shift of a gated MLP, and everything it leaves out

      y(u) = W_d (φ(W_g u) ⊙ W_u u)

    Claim.  For every update (dW_g, dW_u, dW_d), small or large,

      y_tuned = y + shift + remainder,
      shift     = dW_d m + W_d dm,
      dm        = φ'(a_g) ⊙ a_u ⊙ e_g + φ(a_g) ⊙ e_u,
      remainder = W_d r + dW_d (dm + r),
      r         = φ'(a_g) ⊙ e_g ⊙ e_u + ρ ⊙ (a_u + e_u),

    with a_g = W_g u, a_u = W_u u, m = φ(a_g) ⊙ a_u the values before the update,
    e_g = dW_g u, e_u = dW_u u the moves of the pre-activations, and
    ρ = φ(a_g + e_g) - φ(a_g) - φ'(a_g) e_g what the line misses of φ.

    A steer v at mlp_in (the input of the MLP, after its norm) obeys the same
    formula with e_g = W_g v, e_u = W_u v and dW_d = 0.

    Assumptions.  None on φ, and none on φ': the identities are algebra over any
    commutative ring.  That φ' is the derivative of φ, and hence that [shift] is
    the JVP, is the subject of glu_derivative.v; that the remainder is of second
    order, of glu_remainder_bound.v.

    Not said here.  The input u is held fixed: this is the local shift of one MLP.
    How the shifts of several blocks combine is in superposition.v. *)
From mathcomp Require Import all_ssreflect all_algebra.
From Equiv Require Import basics.
Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.
Import GRing.Theory.
Local Open Scope ring_scope.

Section Glu.
Variables (R : comRingType) (d n o : nat) (phi phi' : R -> R).

(** Hidden activation m = φ(a_g) ⊙ a_u. *)
Definition gate (ag au : 'cV[R]_n) : 'cV[R]_n := map_mx phi ag ⊙ au.

(** Gated MLP y = W_d (φ(W_g u) ⊙ W_u u). *)
Definition glu (Wg Wu : 'M[R]_(n, d)) (Wd : 'M[R]_(o, n)) u :=
  Wd *m gate (Wg *m u) (Wu *m u).

(** What a line misses of φ: ρ(a, e) = φ(a + e) - φ(a) - φ'(a) e. *)
Definition act_rem (a e : R) : R := phi (a + e) - (phi a + phi' a * e).

(** The same, entry by entry. *)
Definition act_remv (a e : 'cV[R]_n) : 'cV[R]_n := \col_i act_rem (a i 0) (e i 0).

(** First-order change of m: dm = φ'(a_g) ⊙ a_u ⊙ e_g + φ(a_g) ⊙ e_u. *)
Definition dgate (ag au eg eu : 'cV[R]_n) : 'cV[R]_n :=
  map_mx phi' ag ⊙ au ⊙ eg + map_mx phi ag ⊙ eu.

(** The rest: r = φ'(a_g) ⊙ e_g ⊙ e_u + ρ ⊙ (a_u + e_u). *)
Definition gate_rem (ag au eg eu : 'cV[R]_n) : 'cV[R]_n :=
  map_mx phi' ag ⊙ eg ⊙ eu + act_remv ag eg ⊙ (au + eu).

(** m(a_g + e_g, a_u + e_u) = m + dm + r. *)
Lemma gate_expansion ag au eg eu :
  gate (ag + eg) (au + eu)
    = gate ag au + dgate ag au eg eu + gate_rem ag au eg eu.
Proof.
apply/colP=> i; rewrite !mxE /act_rem.
set s := phi (_ + _); set s0 := phi _; set s1 := phi' _.
set a := au i 0; set g := eg i 0; set e := eu i 0.
have -> : s = s0 + s1 * g + (s - (s0 + s1 * g)) by rewrite addrC subrK.
rewrite (addrC (s0 + _)) addrK [in LHS]mulrDl addrC [in LHS]mulrDl.
rewrite !addrA; congr (_ + _).
rewrite mulrDr [in LHS]mulrDr (mulrAC s1 a g).
by rewrite -!addrA; congr (_ + _); rewrite addrCA.
Qed.

(** First-order shift of an update: dW_d m + W_d dm. *)
Definition shift_update (Wg Wu : 'M_(n, d)) (Wd : 'M_(o, n)) dWg dWu dWd u :=
  dWd *m gate (Wg *m u) (Wu *m u)
  + Wd *m dgate (Wg *m u) (Wu *m u) (dWg *m u) (dWu *m u).

(** First-order shift of a steer v at mlp_in: W_d dm with e_g = W_g v, e_u = W_u v. *)
Definition shift_mlp_in (Wg Wu : 'M_(n, d)) (Wd : 'M_(o, n)) u v :=
  Wd *m dgate (Wg *m u) (Wu *m u) (Wg *m v) (Wu *m v).

(** Remainder of an update: W_d r + dW_d (dm + r). *)
Definition rem_update (Wg Wu : 'M_(n, d)) (Wd : 'M_(o, n)) dWg dWu dWd u :=
  let r := gate_rem (Wg *m u) (Wu *m u) (dWg *m u) (dWu *m u) in
  Wd *m r + dWd *m (dgate (Wg *m u) (Wu *m u) (dWg *m u) (dWu *m u) + r).

(** Remainder of a steer: W_d r. *)
Definition rem_mlp_in (Wg Wu : 'M_(n, d)) (Wd : 'M_(o, n)) u v :=
  Wd *m gate_rem (Wg *m u) (Wu *m u) (Wg *m v) (Wu *m v).

(** y_tuned = y + shift + remainder, for every update. *)
Theorem glu_expansion Wg Wu Wd dWg dWu dWd u :
  glu (Wg + dWg) (Wu + dWu) (Wd + dWd) u
    = glu Wg Wu Wd u + shift_update Wg Wu Wd dWg dWu dWd u
      + rem_update Wg Wu Wd dWg dWu dWd u.
Proof.
rewrite /glu !(mulmxDl _ _ u) gate_expansion /shift_update /rem_update /=.
move: (gate _ _) (dgate _ _ _ _) (gate_rem _ _ _ _) => m dm r.
rewrite -(addrA m) mulmxDl !(mulmxDr Wd) (mulmxDr dWd m).
by rewrite (addrA (Wd *m m)) addrACA -(addrA (Wd *m m)) (addrC (Wd *m dm)).
Qed.

(** y(u + v) = y(u) + shift + remainder, for every steer v at mlp_in. *)
Theorem glu_expansion_mlp_in Wg Wu Wd u v :
  glu Wg Wu Wd (u + v)
    = glu Wg Wu Wd u + shift_mlp_in Wg Wu Wd u v + rem_mlp_in Wg Wu Wd u v.
Proof. by rewrite /glu !mulmxDr gate_expansion 2!(mulmxDr Wd). Qed.

(** Jacobian of the hidden activation:
    J(u) = diag(φ'(a_g) ⊙ a_u) W_g + diag(φ(a_g)) W_u. *)
Definition gate_jacobian (Wg Wu : 'M_(n, d)) u : 'M[R]_(n, d) :=
  diag_mx (map_mx phi' (Wg *m u) ⊙ (Wu *m u))^T *m Wg
  + diag_mx (map_mx phi (Wg *m u))^T *m Wu.

(** The shift of a steer is linear in it: shift = A(u) v with A(u) = W_d J(u). *)
Theorem shift_mlp_inE Wg Wu Wd u v :
  shift_mlp_in Wg Wu Wd u v = (Wd *m gate_jacobian Wg Wu u) *m v.
Proof. by rewrite /shift_mlp_in /dgate !(had_mulmx _ _ v) -mulmxDl mulmxA. Qed.
End Glu.
